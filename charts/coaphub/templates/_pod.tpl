{{/* The template of a pod: of one part with a target in .part, else of the whole hub. .root is the chart's context. */}}
{{- define "coaphub.pod" -}}
{{- $part := .part -}}
{{- $doors := append (include "coaphub.doorsOf" $part | splitList " ") "admin" -}}
{{- $ports := include "coaphub.ports" .root | fromYaml -}}
{{- $resources := .root.Values.resources -}}
{{- with $part }}{{- with (get $.root.Values.parts .).resources }}{{- $resources = . }}{{- end }}{{- end -}}
metadata:
  labels:
    {{- include "coaphub.labels" $.root | nindent 4 }}
    {{- with $part }}
    app.kubernetes.io/component: {{ . }}
    {{- if include "coaphub.doorsOf" $part }}
    coaphub-door: "true"
    {{- end }}
    {{- end }}
    {{- with $.root.Values.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  annotations:
    # The hub reads its configuration at the start.
    checksum/config: {{ include "coaphub.config" $.root | sha256sum }}
    {{- if include "coaphub.ownSecrets" $.root }}
    checksum/secrets: {{ include "coaphub.ownSecrets" $.root | sha256sum }}
    {{- end }}
    {{- with $.root.Values.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  automountServiceAccountToken: false
  enableServiceLinks: false
  terminationGracePeriodSeconds: 30
  securityContext:
    runAsNonRoot: true
    runAsUser: 65532
    runAsGroup: 65532
    fsGroup: 65532
    # A change of all files' mode at each start would open keys to the group.
    fsGroupChangePolicy: OnRootMismatch
    seccompProfile:
      type: RuntimeDefault
  {{- with $.root.Values.image.pullSecrets }}
  imagePullSecrets: {{- range . }}
    - name: {{ . }}
  {{- end }}
  {{- end }}
  {{- with $.root.Values.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- with $.root.Values.nodeSelector }}
  nodeSelector: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $.root.Values.tolerations }}
  tolerations: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $.root.Values.affinity }}
  affinity: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- if $part }}
  {{- with $.root.Values.topologySpread }}
  topologySpreadConstraints:
    {{- range . }}
    - topologyKey: {{ . }}
      maxSkew: 1
      whenUnsatisfiable: ScheduleAnyway
      labelSelector:
        matchLabels:
          {{- include "coaphub.selector" $.root | nindent 10 }}
          app.kubernetes.io/component: {{ $part }}
      {{- if ne $part "certificate-authority" }}
      matchLabelKeys: [pod-template-hash]
      {{- end }}
    {{- end }}
  {{- end }}
  {{- end }}
  containers:
    - name: coaphub
      image: {{ printf "%s:%s" $.root.Values.image.repository ($.root.Values.image.tag | default $.root.Chart.AppVersion) | quote }}
      imagePullPolicy: {{ $.root.Values.image.pullPolicy }}
      args: ["serve", "--config", "/etc/coaphub/coaphub.yaml"{{ with $part }}, "--target", {{ . | quote }}{{ end }}]
      env:
        # A folder in the volume: the volume's own may belong to root and hold lost+found.
        - name: COAPHUB_DATA
          value: /data/hub
        {{- with $.root.Values.env }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      ports:
        {{- range $name := list "coaps" "enrol" "enrol-http" }}
        {{- with has $name $doors | ternary (get $ports $name) "" }}
        - name: {{ $name }}-tcp
          containerPort: {{ . }}
          protocol: TCP
        {{- if ne $name "enrol-http" }}
        - name: {{ $name }}-udp
          containerPort: {{ . }}
          protocol: UDP
        {{- end }}
        {{- end }}
        {{- end }}
        {{- range $name := list "http" "grpc" "admin" }}
        {{- with has $name $doors | ternary (get $ports $name) "" }}
        - name: {{ $name }}
          containerPort: {{ . }}
          protocol: TCP
        {{- end }}
        {{- end }}
      # A hub with many devices reads for a while before it serves{{ if $part }}, and a part waits for the servers and parts that it needs{{ end }}: ten minutes at most.
      startupProbe:
        httpGet: {path: /ready, port: admin, scheme: HTTPS}
        periodSeconds: 2
        timeoutSeconds: 2
        failureThreshold: 300
      livenessProbe:
        httpGet: {path: /live, port: admin, scheme: HTTPS}
        periodSeconds: 10
        timeoutSeconds: 5
        failureThreshold: 6
      readinessProbe:
        httpGet: {path: /ready, port: admin, scheme: HTTPS}
        periodSeconds: 5
        timeoutSeconds: 2
      securityContext:
        allowPrivilegeEscalation: false
        readOnlyRootFilesystem: true
        capabilities:
          drop: [ALL]
      {{- with $resources }}
      resources: {{- toYaml . | nindent 8 }}
      {{- end }}
      volumeMounts:
        - name: data
          mountPath: /data
        - name: config
          mountPath: /etc/coaphub/coaphub.yaml
          subPath: coaphub.yaml
          readOnly: true
        {{- range $i, $name := $.root.Values.secrets }}
        - name: secret-{{ $i }}
          mountPath: /etc/coaphub/secrets/{{ $name }}
          readOnly: true
        {{- end }}
        {{- if $part }}
        - name: identity
          mountPath: /etc/coaphub/identity
          readOnly: true
        {{- end }}
        {{- if and $.root.Values.backup.existingClaim (not $part) }}
        - name: backup
          mountPath: /backup
        {{- end }}
  volumes:
    - name: config
      configMap:
        name: {{ include "coaphub.name" $.root }}
    {{- range $i, $name := $.root.Values.secrets }}
    - name: secret-{{ $i }}
      secret:
        secretName: {{ $name }}
        defaultMode: 0440
    {{- end }}
    {{- if $part }}
    - name: identity
      projected:
        defaultMode: 0440
        sources: {{- include "coaphub.identity" $ | nindent 10 }}
    {{- if ne $part "certificate-authority" }}
    # Lists of revoked certificates that are fetched again, and the socket of kubectl exec.
    - name: data
      emptyDir: {}
    {{- end }}
    {{- end }}
    {{- with (not $part) | ternary $.root.Values.backup.existingClaim "" }}
    - name: backup
      persistentVolumeClaim:
        claimName: {{ . }}
    {{- end }}
{{- end }}

{{- define "coaphub.claims" -}}
- metadata:
    name: data
    labels: {{- include "coaphub.selector" . | nindent 6 }}
  spec:
    accessModes: [ReadWriteOnce]
    {{- with .Values.storage.className }}
    storageClassName: {{ . }}
    {{- end }}
    resources:
      requests:
        storage: {{ .Values.storage.size }}
{{- end }}
