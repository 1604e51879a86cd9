{{- define "aurora.name" -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- end }}

{{- define "aurora.labels" -}}
app.kubernetes.io/name: aurora
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "aurora.secret" -}}
{{- .Values.auth.existingSecret | default (printf "%s-auth" (include "aurora.name" .)) -}}
{{- end }}

{{- define "aurora.claim" -}}
{{- .Values.storage.existingClaim | default (printf "%s-shared" (include "aurora.name" .)) -}}
{{- end }}

{{/* Ray asks for a token everywhere; only the router knows the API key. */}}
{{- define "aurora.rayEnv" -}}
- name: RAY_AUTH_MODE
  value: token
- name: RAY_AUTH_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ include "aurora.secret" . }}
      key: ray-token
{{- end }}

{{- define "aurora.containerSecurity" -}}
allowPrivilegeEscalation: false
runAsNonRoot: true
runAsUser: 1000
capabilities:
  drop: [ALL]
{{- end }}

{{/*
A pod template. Give it a dict: root, role (head, router, serve or train), pod (its values), shmSize, and optionally
command (shell lines; default: what KubeRay would run), ports, probes and env, as YAML text.
*/}}
{{- define "aurora.pod" -}}
metadata:
  labels:
    {{- include "aurora.labels" .root | nindent 4 }}
    app.kubernetes.io/component: {{ .role }}
spec:
  automountServiceAccountToken: false
  enableServiceLinks: false
  terminationGracePeriodSeconds: 120
  securityContext:
    runAsNonRoot: true
    runAsUser: 1000
    runAsGroup: 1000
    fsGroup: 1000
    fsGroupChangePolicy: OnRootMismatch
    seccompProfile:
      type: RuntimeDefault
  {{- with .root.Values.image.pullSecrets }}
  imagePullSecrets:
    {{- range . }}
    - name: {{ . }}
    {{- end }}
  {{- end }}
  {{- with .pod.nodeSelector }}
  nodeSelector: {{ toJson . }}
  {{- end }}
  {{- with .pod.tolerations }}
  tolerations: {{ toJson . }}
  {{- end }}
  containers:
    - name: {{ .role }}
      image: "{{ .root.Values.image.repository }}:{{ .root.Values.image.tag }}"
      imagePullPolicy: {{ .root.Values.image.pullPolicy }}
      command: [/bin/bash, -c]
      args:
        - |
          ulimit -n 65536 || true
          {{- .command | default "eval \"exec $KUBERAY_GEN_RAY_START_CMD\"" | nindent 10 }}
      env:
        {{- include "aurora.rayEnv" .root | nindent 8 }}
        - name: RAY_worker_niceness
          value: "0"
        - name: RAY_gcs_rpc_server_reconnect_timeout_s
          value: "300"
        {{- with .env }}
        {{- . | nindent 8 }}
        {{- end }}
      {{- with .ports }}
      ports:
        {{- . | nindent 8 }}
      {{- end }}
      {{- with .probes }}
      {{- . | nindent 6 }}
      {{- end }}
      resources: {{ toJson .pod.resources }}
      securityContext:
        {{- include "aurora.containerSecurity" . | nindent 8 }}
      volumeMounts:
        - {name: shared, mountPath: /data}
        - {name: shm, mountPath: /dev/shm}
        - {name: tmp, mountPath: /tmp}
  volumes:
    - name: shared
      persistentVolumeClaim:
        claimName: {{ include "aurora.claim" .root }}
    - name: shm
      emptyDir: {medium: Memory, sizeLimit: {{ .shmSize }}}
    - name: tmp
      emptyDir: {}
{{- end }}

{{/*
`aurora serve` beside a Ray node of its own, which joins first. The container ends when either of the two does.
*/}}
{{- define "aurora.routerCommand" -}}
eval "$KUBERAY_GEN_RAY_START_CMD" &
node=$!
until [ -S /tmp/ray/session_latest/sockets/raylet ]; do
  kill -0 $node || exit 1
  sleep 1
done
aurora serve {{ .Values.model | squote }} --address auto --host 0.0.0.0 --port 8000 \
  --run-dir /data/runs/{{ include "aurora.name" . }} --replicas {{ .Values.serve.replicas }} \
  --set cluster.wait_s={{ mul .Values.router.startMinutes 60 }}
{{- if index (.Values.serve.resources.limits | default dict) "nvidia.com/gpu" }} --set server.num_gpus=1{{ end }}
{{- if not .Values.train.enabled }} --no-learning
{{- else if index (.Values.train.resources.limits | default dict) "nvidia.com/gpu" }} --set trainer.num_gpus=1{{ end }}
{{- range .Values.args }} {{ . | squote }}{{ end }} &
serve=$!
trap 'kill -TERM $serve; wait $serve; exit $?' TERM
wait -n $node $serve
{{- end }}

{{- define "aurora.routerProbes" -}}
startupProbe:
  httpGet: {path: /health, port: http}
  periodSeconds: 10
  failureThreshold: {{ mul .Values.router.startMinutes 6 }}
livenessProbe:
  httpGet: {path: /health, port: http}
  periodSeconds: 30
  timeoutSeconds: 10
  failureThreshold: {{ mul .Values.router.restartMinutes 2 }}
readinessProbe:
  httpGet: {path: /ready, port: http}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 2
{{- end }}

{{/*
What the head knows of nodes and actors outlives its container, in the pod's own /tmp, for the others to join it again.
Not run to its end yet: docs/cluster.md, "A trial on one host".
*/}}
{{- define "aurora.headEnv" -}}
- name: RAY_gcs_storage
  value: rocksdb
- name: RAY_gcs_storage_path
  value: /tmp/gcs
{{- end }}

{{- define "aurora.routerEnv" -}}
- name: AURORA_API_KEY
  valueFrom:
    secretKeyRef:
      name: {{ include "aurora.secret" . }}
      key: api-key
{{- end }}
