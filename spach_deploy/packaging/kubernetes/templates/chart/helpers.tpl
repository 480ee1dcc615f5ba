{{- /* The image: by digest where there is one, else by tag. */}}
{{- define "@NAME@.image" -}}
{{ .Values.image.repository }}{{ if .Values.image.digest }}@{{ .Values.image.digest }}{{ else }}:{{ .Values.image.tag }}{{ end }}
{{- end }}

{{- /* The name of all objects of a release: two releases share no name. KServe and pods add to it. */}}
{{- define "@NAME@.fullname" -}}
{{- $name := .Release.Name }}
{{- if not (contains .Chart.Name $name) }}{{ $name = printf "%s-%s" .Release.Name .Chart.Name }}{{ end }}
{{- default $name .Values.fullnameOverride | trunc @LONGEST@ | trimSuffix "-" }}
{{- end }}

{{- /* The chart's name and version as a label. */}}
{{- define "@NAME@.chart" -}}
{{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{- end }}
