{{- define "sliceproxy.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end -}}

{{/* The files of the ConfigMap as one YAML mapping: the chart's own are those of deploy/base. */}}
{{- define "sliceproxy.files" -}}
{{- $config := .Files.Get "files/config.conf" -}}
{{- if .Values.config -}}
{{- $config = mergeOverwrite ($config | fromYaml) (deepCopy .Values.config) | toYaml -}}
{{- end -}}
config.conf: |
{{ $config | trimSuffix "\n" | indent 2 }}
kubeconfig.conf: |
{{ .Files.Get "files/kubeconfig.conf" | replace "https://CONTROL-PLANE:6443" .Values.apiServer | trimSuffix "\n" | indent 2 }}
{{- end -}}
