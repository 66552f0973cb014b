#!/usr/bin/env bash
# Serve a published repository with Triton; on SIGTERM let clients move away before the server ends.
#   hsnn-triton [--repository=DIR] [--key-file=FILE] [--http-port=N] [--drain-seconds=N] [--probe-failures=N]
#               [--tls-cert=FILE --tls-key=FILE [--client-ca=FILE]] [--trace-endpoint=URL [--trace-rate=N]]
#               [-- OPTIONS OF TRITONSERVER]
set -euo pipefail

repository=/models
key_file=/run/secrets/hsnn_admin_key
http_port=8000
drain_seconds=10
probe_failures=2
tls_cert=
tls_key=
client_ca=
trace_endpoint=
trace_rate=1000
tools=/opt/hsnn # probe.py, drain.py
busy_since=/tmp/hsnn-busy # the probe's memory, of Kubernetes too

fail() {
  echo "hsnn-triton: $*" >&2
  exit 1
}

while (($#)); do
  case $1 in
    --repository=*) repository=${1#*=} ;;
    --key-file=*) key_file=${1#*=} ;;
    --http-port=*) http_port=${1#*=} ;;
    --drain-seconds=*) drain_seconds=${1#*=} ;;
    --probe-failures=*) probe_failures=${1#*=} ;;
    --tls-cert=*) tls_cert=${1#*=} ;;
    --tls-key=*) tls_key=${1#*=} ;;
    --client-ca=*) client_ca=${1#*=} ;;
    --trace-endpoint=*) trace_endpoint=${1#*=} ;;
    --trace-rate=*) trace_rate=${1#*=} ;;
    --)
      shift
      break
      ;;
    *) fail "$1: unknown option; expected --repository=, --key-file=, --http-port=, --drain-seconds=, --probe-failures=," \
      "--tls-cert=, --tls-key=, --client-ca=, --trace-endpoint=, --trace-rate=, and after -- what tritonserver takes" ;;
  esac
  shift
done

[[ $http_port =~ ^[0-9]+$ ]] || fail "--http-port: got '$http_port', expected a port"
[[ $drain_seconds =~ ^[0-9]+$ ]] || fail "--drain-seconds: got '$drain_seconds', expected a whole number of seconds"
[[ $probe_failures =~ ^[0-9]+$ ]] || fail "--probe-failures: got '$probe_failures', expected a whole number, 0 for no probes"
[[ -r $key_file ]] || fail "$key_file: no such file, or not readable by user $(id -u); expected the admin key"
key=$(<"$key_file")
[[ $key =~ ^[A-Za-z0-9_-]{16,}$ ]] ||
  fail "$key_file: expected an admin key of at least 16 letters, digits, - or _; make one with: openssl rand -hex 24"
[[ -f $repository/hsnn_retrieve/config.pbtxt ]] ||
  fail "$repository: no hsnn_retrieve there; publish first: hsnn publish RUN --repository DIR"
[[ ($tls_cert && $tls_key) || -z $tls_cert$tls_key ]] || fail "--tls-cert and --tls-key: give both or neither"
[[ -z $client_ca || $tls_cert ]] || fail "--client-ca: needs --tls-cert and --tls-key"
[[ -z $trace_endpoint || $trace_endpoint =~ ^https?://[^/]+/. ]] ||
  fail "--trace-endpoint: got '$trace_endpoint', expected a collector's address like http://otel-collector:4318/v1/traces"
[[ $trace_rate =~ ^[1-9][0-9]*$ ]] || fail "--trace-rate: got '$trace_rate', expected a whole number above 0: every n-th request"
for file in "$tls_cert" "$tls_key" "$client_ca"; do
  [[ -z $file || -r $file ]] || fail "$file: no such file, or not readable by user $(id -u)"
done

options=()
for config in "$repository"/hsnn_*/config.pbtxt; do
  model=${config%/config.pbtxt}
  # A candidate serves nobody after a restart: hsnn rollout starts its canary again.
  [[ ${model##*/} == hsnn_canary ]] || options+=("--load-model=${model##*/}")
done
# gRPC clients stay with a connection for as long as it lasts. Closed by age, in the middle of nothing, each moves on within
# a drain (the age varies by a tenth), and finds replicas that came later.
((drain_seconds == 0)) || options+=(
  "--grpc-max-connection-age=$((drain_seconds * 800))"
  --grpc-max-connection-age-grace=30000
)
if [[ $tls_cert ]]; then
  options+=(--grpc-use-ssl=true "--grpc-server-cert=$tls_cert" "--grpc-server-key=$tls_key")
  # Who must show a certificate on gRPC shall not go round it: Triton's HTTP has no TLS. Metrics would follow HTTP's address.
  [[ -z $client_ca ]] || options+=(
    --grpc-use-ssl-mutual=true
    "--grpc-root-cert=$client_ca"
    --http-address=127.0.0.1
    --metrics-address=0.0.0.0
  )
fi

if [[ $trace_endpoint ]]; then
  # Triton and the orchestrator read it.
  export OTEL_EXPORTER_OTLP_TRACES_ENDPOINT=$trace_endpoint
  options+=(
    --trace-config=mode=opentelemetry
    --trace-config=level=TIMESTAMPS
    "--trace-config=rate=$trace_rate"
    "--trace-config=opentelemetry,resource=service.name=triton"
  )
fi

url=http://127.0.0.1:$http_port

# What lets a client read or change the server needs the key. Triton takes it as an argument only, so it is
# visible to whoever may list this container's processes.
restricted="model-repository,shared-memory,trace,logging:admin-key=$key"

# A killed server leaves its regions; where /dev/shm outlives the container (Kubernetes) they would fill it.
regions=hsnn-$HOSTNAME-
rm -f "/dev/shm/$regions"* "$busy_since"

tritonserver \
  --model-repository="$repository" \
  --http-port="$http_port" \
  --model-control-mode=explicit \
  --disable-auto-complete-config \
  --strict-readiness=false \
  --exit-timeout-secs=30 \
  --log-format=ISO8601 \
  --backend-config=python,shm-region-prefix-name="$regions" \
  --backend-config=python,shm-default-byte-size=4194304 \
  --backend-config=python,shm-growth-byte-size=4194304 \
  --grpc-restricted-protocol="$restricted" \
  --http-restricted-api="$restricted" \
  "${options[@]}" \
  "$@" &
server=$!

# Docker restarts a container that ended, not one that is unhealthy. So once the server has answered the smoke request, it
# is asked again and again, and killed when it fails several times: whoever runs the container starts it anew. One that
# refuses because it is busy is alive (--live), unless it answered nobody for minutes (--busy-since).
watch() {
  local said answered='' failures=0
  while sleep 2 2>/dev/null; do
    if said=$(python3 "$tools/probe.py" --url "$url" --repository "$repository" --timeout 3 \
      --live --busy-since "$busy_since" 2>&1); then
      answered=yes failures=0
    elif [[ $answered ]]; then
      failures=$((failures + 1))
      echo "hsnn-triton: probe $failures of $probe_failures failed: $said" >&2
      if ((failures == probe_failures)); then
        echo "hsnn-triton: ending the server, it does not answer" >&2
        kill -KILL "$server"
        return
      fi
    fi
  done
}
watcher=
if ((probe_failures)); then
  watch &
  watcher=$!
fi

draining=
drain() {
  trap '' TERM INT
  draining=yes
  [[ -z $watcher ]] || kill "$watcher" 2>/dev/null || true
  echo "hsnn-triton: stopping in $drain_seconds s; requests are answered until then" >&2
  sleep "$drain_seconds"
  # A Triton that is told to end fails what its models still ask of each other, and goes on listening while anybody keeps an
  # HTTP connection. So the models that clients ask end first, with what they have begun; then nothing is worth waiting for.
  if python3 "$tools/drain.py" --url "$url" --key-file "$key_file" --timeout 10 >&2; then
    draining=finished
    kill -KILL "$server" 2>/dev/null || true
  else
    kill -TERM "$server" 2>/dev/null || true
  fi
}
trap drain TERM INT

status=0
wait "$server" || status=$?
if [[ $draining ]]; then
  # The signal ended the first wait, not the server.
  status=0
  wait "$server" || status=$?
fi
[[ -z $watcher ]] || kill "$watcher" 2>/dev/null || true
[[ $draining != finished ]] || status=0
exit "$status"
