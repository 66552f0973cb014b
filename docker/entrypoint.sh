#!/usr/bin/env bash
# Serve a published repository with Triton; on SIGTERM let clients move away before the server ends.
#   hsnn-triton [--repository=DIR] [--key-file=FILE] [--drain-seconds=N] [-- OPTIONS OF TRITONSERVER]
set -euo pipefail

repository=/models
key_file=/run/secrets/hsnn_admin_key
drain_seconds=10

fail() {
  echo "hsnn-triton: $*" >&2
  exit 1
}

while (($#)); do
  case $1 in
    --repository=*) repository=${1#*=} ;;
    --key-file=*) key_file=${1#*=} ;;
    --drain-seconds=*) drain_seconds=${1#*=} ;;
    --)
      shift
      break
      ;;
    *) fail "$1: unknown option; expected --repository=, --key-file=, --drain-seconds=, and after -- what tritonserver takes" ;;
  esac
  shift
done

[[ $drain_seconds =~ ^[0-9]+$ ]] || fail "--drain-seconds: got '$drain_seconds', expected a whole number of seconds"
[[ -r $key_file ]] || fail "$key_file: no such file, or not readable by user $(id -u); expected the admin key"
key=$(<"$key_file")
[[ $key =~ ^[A-Za-z0-9_-]{16,}$ ]] ||
  fail "$key_file: expected an admin key of at least 16 letters, digits, - or _; make one with: openssl rand -hex 24"
[[ -f $repository/hsnn_retrieve/config.pbtxt ]] ||
  fail "$repository: no hsnn_retrieve there; publish first: hsnn publish RUN --repository DIR"

models=()
for config in "$repository"/hsnn_*/config.pbtxt; do
  model=${config%/config.pbtxt}
  # A candidate serves nobody after a restart: hsnn rollout starts its canary again.
  [[ ${model##*/} == hsnn_canary ]] || models+=("--load-model=${model##*/}")
done

# What lets a client read or change the server needs the key. Triton takes it as an argument only, so it is
# visible to whoever may list this container's processes.
restricted="model-repository,shared-memory,trace,logging:admin-key=$key"

tritonserver \
  --model-repository="$repository" \
  --model-control-mode=explicit \
  "${models[@]}" \
  --disable-auto-complete-config \
  --strict-readiness=false \
  --exit-timeout-secs=30 \
  --log-format=ISO8601 \
  --backend-config=python,shm-default-byte-size=4194304 \
  --backend-config=python,shm-growth-byte-size=4194304 \
  --grpc-restricted-protocol="$restricted" \
  --http-restricted-api="$restricted" \
  "$@" &
server=$!

draining=
drain() {
  trap '' TERM INT
  draining=yes
  echo "hsnn-triton: stopping in $drain_seconds s; requests are answered until then" >&2
  sleep "$drain_seconds"
  kill -TERM "$server" 2>/dev/null || true
}
trap drain TERM INT

status=0
wait "$server" || status=$?
if [[ $draining ]]; then
  # The signal ended the first wait, not the server.
  status=0
  wait "$server" || status=$?
fi
exit "$status"
