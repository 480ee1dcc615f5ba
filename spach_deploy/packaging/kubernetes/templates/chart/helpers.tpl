{{- /* The image: by digest where there is one, else by tag. */}}
{{- define "@NAME@.image" -}}
{{ .Values.image.repository }}{{ if .Values.image.digest }}@{{ .Values.image.digest }}{{ else }}:{{ .Values.image.tag }}{{ end }}
{{- end }}
