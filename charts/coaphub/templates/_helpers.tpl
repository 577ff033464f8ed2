{{- define "coaphub.name" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name | trunc 52 | trimSuffix "-" }}{{ else }}{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 52 | trimSuffix "-" }}{{ end }}
{{- end }}

{{- define "coaphub.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "coaphub.labels" -}}
{{ include "coaphub.selector" . }}
app.kubernetes.io/version: {{ .Values.image.tag | default .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{/* The configuration: what the values say, and what only the cluster knows. */}}
{{- define "coaphub.config" -}}
{{- $c := deepCopy .Values.config -}}
{{- if not $c.externalAddress -}}
{{- $_ := set $c "externalAddress" (printf "%s.%s.svc" (include "coaphub.name" .) .Release.Namespace) -}}
{{- end -}}
{{- if .Values.ingress.enabled -}}
{{- $http := $c.grpcGateway.api.http -}}
{{- if not (has .Values.ingress.host ($http.hosts | default list)) -}}
{{- $_ := set $http "hosts" (append ($http.hosts | default list) .Values.ingress.host) -}}
{{- end -}}
{{- if and (not (dig "authorization" "issuers" list $c)) (not (dig "oauthServer" "issuer" "" $c)) -}}
{{- $_ := set $c "oauthServer" (merge (dict "issuer" (printf "https://%s/oauth" .Values.ingress.host)) ($c.oauthServer | default dict)) -}}
{{- end -}}
{{- end -}}
{{ toYaml $c }}
{{- end }}

{{/* The ports that the configuration names, as a map; a door without address has none. */}}
{{- define "coaphub.ports" -}}
{{- $c := .Values.config -}}
{{- $doors := dict "coaps" $c.coapGateway.api.coap.address "enrol" $c.enrolmentGateway.api.coap.address "enrol-http" $c.enrolmentGateway.api.http.address "http" $c.grpcGateway.api.http.address "grpc" $c.grpcGateway.api.grpc.address "admin" $c.admin.api.http.address -}}
{{- range $name, $address := $doors -}}
{{- if regexMatch "^(127\\.|localhost:|\\[::1\\]:)" $address -}}
{{- fail (printf "config: the address %s of %s is the pod's own: nobody would reach it. Write \"[::]:PORT\"" $address $name) -}}
{{- end -}}
{{- with regexFind "[0-9]+$" $address }}
{{ $name }}: {{ . }}
{{- end }}
{{- end }}
{{- end }}

{{/* The ports of devices' doors for one protocol. */}}
{{- define "coaphub.devicePorts" -}}
{{- $p := include "coaphub.ports" .root | fromYaml -}}
{{- range $name := list "coaps" "enrol" "enrol-http" }}
{{- $port := get $p $name }}
{{- if and $port (or (eq $.protocol "TCP") (ne $name "enrol-http")) }}
- name: {{ printf "%s-%s" $name ($.protocol | lower) }}
  port: {{ $port }}
  targetPort: {{ printf "%s-%s" $name ($.protocol | lower) }}
  protocol: {{ $.protocol }}
{{- end }}
{{- end }}
{{- end }}
