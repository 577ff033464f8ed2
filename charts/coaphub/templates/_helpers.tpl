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
{{- with .Values.ingress.enabled | ternary .Values.ingress.host (.Values.gateway.enabled | ternary .Values.gateway.host "") -}}
{{- $http := $c.grpcGateway.api.http -}}
{{- if not (has . ($http.hosts | default list)) -}}
{{- $_ := set $http "hosts" (append ($http.hosts | default list) .) -}}
{{- end -}}
{{- if and (not (dig "authorization" "issuers" list $c)) (not (dig "oauthServer" "issuer" "" $c)) -}}
{{- $_ := set $c "oauthServer" (merge (dict "issuer" (printf "https://%s/oauth" .)) ($c.oauthServer | default dict)) -}}
{{- end -}}
{{- end -}}
{{- if .Values.parts -}}
{{- if and (not (kindIs "map" (get .Values.parts "oauth-server"))) (not (dig "authorization" "issuers" list $c)) -}}
{{- fail "parts: without an oauth-server nobody sees to the embedded provider's keys; name one, or config.authorization.issuers" -}}
{{- end -}}
{{- if and (eq .Values.devices.externalTrafficPolicy "Local") (ne .Values.devices.type "ClusterIP") (not (include "coaphub.devicesApart" .)) -}}
{{- fail "devices: gateways for devices and for enrolment are different pods, so behind one address a node without one of them would drop what comes for it. Give gateways for devices an address of their own with config.coapGateway.api.coap.externalAddress (NAME:PORT), or write devices.externalTrafficPolicy: Cluster, which hides devices' addresses from the hub" -}}
{{- end -}}
{{- if and (include "coaphub.mongodbSecret" .) (not (dig "mongodb" "user" "" $c.store)) -}}
{{- fail "mongodb: the password is config.store.mongodb.user's, which is empty" -}}
{{- end -}}
{{- range $target, $part := .Values.parts -}}
{{- if and $.Values.nats.identities (kindIs "map" $part) (not (get $.Values.nats.identities $target)) -}}
{{- fail (printf "nats.identities: %s has none; it could not sign in" $target) -}}
{{- end -}}
{{- end -}}
{{- $_ := set $c "cluster" (merge (dict "secret" (dict "file" "/etc/coaphub/identity/cluster-secret")) ($c.cluster | default dict)) -}}
{{- if include "coaphub.mongodbSecret" . -}}
{{- $_ := set $c.store "mongodb" (merge (dict "password" (dict "file" "/etc/coaphub/identity/mongodb-password")) $c.store.mongodb) -}}
{{- end -}}
{{- if include "coaphub.natsSecret" . -}}
{{- $_ := set $c "bus" (merge (dict (eq .Values.nats.kind "nkey" | ternary "nkeyFile" "credentialsFile") "/etc/coaphub/identity/nats") $c.bus) -}}
{{- end -}}
{{- end -}}
{{ toYaml $c }}
{{- end }}

{{/* Not empty: devices reach their gateways under another name than everything else, so these have Services of their own. */}}
{{- define "coaphub.devicesApart" -}}
{{- if .Values.parts }}{{ dig "api" "coap" "externalAddress" "" .Values.config.coapGateway }}{{ end -}}
{{- end }}

{{/* The names of the ports of a part's doors; of all for none. */}}
{{- define "coaphub.doorsOf" -}}
{{- get (dict "" "coaps enrol enrol-http http grpc" "coap-gateway" "coaps" "enrolment-gateway" "enrol enrol-http" "grpc-gateway" "http grpc") . -}}
{{- end }}

{{/* The names of Secrets: those that are there, or the one that the chart makes of the values. */}}
{{- define "coaphub.clusterSecret" -}}
{{- with .Values.cluster }}{{ .existingSecret | default (empty .secret | ternary "" (printf "%s-own" (include "coaphub.name" $))) }}{{ end -}}
{{- end }}
{{- define "coaphub.mongodbSecret" -}}
{{- with .Values.mongodb }}{{ .existingSecret | default (empty .password | ternary "" (printf "%s-own" (include "coaphub.name" $))) }}{{ end -}}
{{- end }}
{{- define "coaphub.natsSecret" -}}
{{- with .Values.nats }}{{ .existingSecret | default (empty .identities | ternary "" (printf "%s-own" (include "coaphub.name" $))) }}{{ end -}}
{{- end }}

{{/* What the chart's own Secret holds. */}}
{{- define "coaphub.ownSecrets" -}}
{{- if .Values.parts -}}
{{- with .Values.cluster.secret }}
secret: {{ . | quote }}
{{- end }}
{{- with .Values.mongodb.password }}
password: {{ . | quote }}
{{- end }}
{{- range $target, $text := .Values.nats.identities }}
{{ $target }}.{{ $.Values.nats.kind }}: {{ $text | quote }}
{{- end }}
{{- end -}}
{{- end }}

{{/* What a part proves itself by: the secret of the cluster, and its accounts at MongoDB and NATS. */}}
{{- define "coaphub.identity" -}}
- secret:
    name: {{ include "coaphub.clusterSecret" .root }}
    items: [{key: secret, path: cluster-secret}]
{{- with include "coaphub.mongodbSecret" .root }}
- secret:
    name: {{ . }}
    items: [{key: password, path: mongodb-password}]
{{- end }}
{{- with include "coaphub.natsSecret" .root }}
- secret:
    name: {{ . }}
    items: [{key: {{ $.part }}.{{ $.root.Values.nats.kind }}, path: nats}]
{{- end }}
{{- end }}

{{- define "coaphub.partSelector" -}}
{{ include "coaphub.selector" .root }}
app.kubernetes.io/component: {{ .part }}
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

{{/* The ports of devices' doors for one protocol; of those in .doors, if it is there. */}}
{{- define "coaphub.devicePorts" -}}
{{- $p := include "coaphub.ports" .root | fromYaml -}}
{{- range $name := list "coaps" "enrol" "enrol-http" }}
{{- $port := get $p $name }}
{{- if and $port (or (eq $.protocol "TCP") (ne $name "enrol-http")) (has $name ($.doors | default (list "coaps" "enrol" "enrol-http"))) }}
- name: {{ printf "%s-%s" $name ($.protocol | lower) }}
  port: {{ $port }}
  targetPort: {{ printf "%s-%s" $name ($.protocol | lower) }}
  protocol: {{ $.protocol }}
{{- end }}
{{- end }}
{{- end }}

{{/* Who may come to the ports of .doors: devices from everywhere, applications and monitoring as the values say. */}}
{{- define "coaphub.ingressRules" -}}
{{- $ports := include "coaphub.ports" .root | fromYaml -}}
{{- $open := list -}}
{{- range $name := list "coaps" "enrol" "enrol-http" -}}
{{- if and (has $name $.doors) (get $ports $name) }}{{ $open = append $open $name }}{{ end -}}
{{- end -}}
{{- with $open }}
- ports:
    {{- range $name := . }}
    - port: {{ get $ports $name }}
      protocol: TCP
    {{- if ne $name "enrol-http" }}
    - port: {{ get $ports $name }}
      protocol: UDP
    {{- end }}
    {{- end }}
{{- end }}
{{- if has "http" .doors }}
{{- with .root.Values.networkPolicy.applications }}
- from: {{- toYaml . | nindent 4 }}
  ports:
    {{- range $name := list "http" "grpc" }}
    - port: {{ get $ports $name }}
      protocol: TCP
    {{- end }}
{{- end }}
{{- end }}
- from:
    # helm test
    - podSelector:
        matchLabels:
          app.kubernetes.io/name: {{ .root.Chart.Name }}-test
          app.kubernetes.io/instance: {{ .root.Release.Name }}
    {{- with .root.Values.networkPolicy.monitoring }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  ports:
    - port: {{ $ports.admin }}
      protocol: TCP
{{- end }}
