package chart

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"sigs.k8s.io/yaml"
)

// schema is a part of an OpenAPI document, as much of it as Kubernetes' own documents use.
type schema struct {
	Ref                  string             `json:"$ref"`
	AllOf                []*schema          `json:"allOf"`
	OneOf                []*schema          `json:"oneOf"`
	Type                 string             `json:"type"`
	Properties           map[string]*schema `json:"properties"`
	Required             []string           `json:"required"`
	Items                *schema            `json:"items"`
	AdditionalProperties json.RawMessage    `json:"additionalProperties"`
	Enum                 []any              `json:"enum"`
	Pattern              string             `json:"pattern"`
	Kinds                []struct {
		Group, Version, Kind string
	} `json:"x-kubernetes-group-version-kind"`
}

// document is the OpenAPI document of one group and version of a release.
type document struct {
	Components struct {
		Schemas map[string]*schema `json:"schemas"`
	} `json:"components"`
}

func openAPI(release, version string) (*document, error) {
	dir := "apis"
	if !strings.Contains(version, "/") {
		dir = "api"
	}
	b, err := os.ReadFile(filepath.Join(release, dir, version+".json"))
	if err != nil {
		return nil, err
	}
	d := &document{}
	return d, json.Unmarshal(b, d)
}

func (d *document) kind(version, kind string) *schema {
	group, v, ok := strings.Cut(version, "/")
	if !ok {
		group, v = "", version
	}
	for _, s := range d.Components.Schemas {
		for _, k := range s.Kinds {
			if k.Group == group && k.Version == v && k.Kind == kind && len(s.Kinds) == 1 {
				return s
			}
		}
	}
	return nil
}

// customResource is the schema of one version in a file of a CustomResourceDefinition.
func customResource(file, version string) (*schema, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	var d struct {
		Spec struct {
			Versions []struct {
				Name   string
				Schema struct{ OpenAPIV3Schema *schema }
			}
		}
	}
	if err := yaml.Unmarshal(b, &d); err != nil {
		return nil, err
	}
	for _, v := range d.Spec.Versions {
		if v.Name == version {
			return v.Schema.OpenAPIV3Schema, nil
		}
	}
	return nil, fmt.Errorf("%s has no version %s", file, version)
}

// check returns what of v the schema does not allow, as a cluster with strict validation would.
func (d *document) check(s *schema, v any, path string) (wrong []string) {
	bad := func(format string, args ...any) { wrong = append(wrong, path+": "+fmt.Sprintf(format, args...)) }
	if s == nil {
		bad("no schema")
		return wrong
	}
	if s.Ref != "" {
		return d.check(d.Components.Schemas[strings.TrimPrefix(s.Ref, "#/components/schemas/")], v, path)
	}
	for _, a := range s.AllOf {
		wrong = append(wrong, d.check(a, v, path)...)
	}
	if len(s.OneOf) > 0 && !slices.ContainsFunc(s.OneOf, func(o *schema) bool { return len(d.check(o, v, path)) == 0 }) {
		bad("%v is none of what it may be", v)
	}
	if len(s.Enum) > 0 && !slices.Contains(s.Enum, v) {
		bad("%v is none of %v", v, s.Enum)
	}
	switch s.Type {
	case "object":
		m, ok := v.(map[string]any)
		if !ok {
			bad("%v is no object", v)
			return wrong
		}
		for _, r := range s.Required {
			if _, ok := m[r]; !ok {
				bad("%s is missing", r)
			}
		}
		for _, k := range slices.Sorted(maps.Keys(m)) {
			switch p, known := s.Properties[k]; {
			case known:
				wrong = append(wrong, d.check(p, m[k], path+"."+k)...)
			case len(s.AdditionalProperties) > 0:
				var more schema
				if err := json.Unmarshal(s.AdditionalProperties, &more); err != nil {
					bad("%v", err)
				}
				wrong = append(wrong, d.check(&more, m[k], path+"."+k)...)
			case len(s.Properties) > 0: // one without any is free
				bad("there is no field %s", k)
			}
		}
	case "array":
		l, ok := v.([]any)
		if !ok {
			bad("%v is no list", v)
			return wrong
		}
		for i, item := range l {
			wrong = append(wrong, d.check(s.Items, item, fmt.Sprintf("%s[%d]", path, i))...)
		}
	case "string":
		if text, ok := v.(string); !ok {
			bad("%v is no text", v)
		} else if s.Pattern != "" && !regexp.MustCompile(s.Pattern).MatchString(text) {
			bad("%q is not like %s", text, s.Pattern)
		}
	case "boolean":
		if _, ok := v.(bool); !ok {
			bad("%v is neither true nor false", v)
		}
	case "integer":
		if f, ok := v.(float64); !ok || f != float64(int64(f)) {
			bad("%v is no whole number", v)
		}
	case "number":
		if _, ok := v.(float64); !ok {
			bad("%v is no number", v)
		}
	}
	return wrong
}
