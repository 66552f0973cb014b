#!/usr/bin/env bash
# Write prometheusrule.yaml from docker/prometheus/alerts.yml, after a change of the alerts.
set -euo pipefail
cd "$(dirname "$0")"
{
  printf '%s\n' '# The alerts of docker/prometheus/alerts.yml, by update.sh.' 'apiVersion: monitoring.coreos.com/v1' \
    'kind: PrometheusRule' 'metadata:' '  name: hsnn' 'spec:'
  sed -n '/^groups:/,$s/^\(.\)/  \1/p' ../../../prometheus/alerts.yml
} >prometheusrule.yaml
