#!/usr/bin/env bash
# Pin the images of docker/.env by the digest that each tag has now; run again to follow the tags.
#   docker/pin.sh && git diff docker/.env
set -euo pipefail
file=$(dirname "$0")/.env

pinned=$(
  while IFS= read -r line; do
    if [[ $line == *_IMAGE=* ]]; then
      image=${line#*=}
      image=${image%@*}
      digest=$(docker buildx imagetools inspect --format '{{.Manifest.Digest}}' "$image")
      [[ $digest =~ ^sha256:[0-9a-f]{64}$ ]] || {
        echo "pin.sh: $image: got '$digest', expected sha256: and 64 hexadecimal digits" >&2
        exit 1
      }
      line="${line%%=*}=$image@$digest"
    fi
    printf '%s\n' "$line"
  done <"$file"
)
printf '%s\n' "$pinned" >"$file.new"
mv "$file.new" "$file"
