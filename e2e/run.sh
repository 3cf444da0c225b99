#!/usr/bin/env bash
# What `make run` does: standalone in front of $UPSTREAM, or of the example API.
set -euo pipefail
data=${HOLDFAST_DATA_DIR:-./data}
mkdir -p "$data"
pids=()
stop() { for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done; wait; }
trap stop EXIT
if [ -z "${UPSTREAM:-}" ]; then
  UPSTREAM=http://127.0.0.1:9000
  bin/exampleapi -addr 127.0.0.1:9000 -db "$data/example.db" -fail-file "$data/broken" >/dev/null &
  pids+=($!)
  example=1
fi
HOLDFAST_UPSTREAM_URL=$UPSTREAM HOLDFAST_DATA_DIR=$data bin/standalone &
standalone=$!
pids+=("$standalone")
for _ in $(seq 100); do
  curl -fs -o /dev/null http://127.0.0.1:9090/readyz 2>/dev/null && break
  kill -0 "$standalone" 2>/dev/null || exit 1
  sleep 0.1
done
cat <<EOF

Holdfast listens on http://127.0.0.1:8080 in front of $UPSTREAM. In another terminal, try:

  curl -i -d 'hello' http://127.0.0.1:8080/calls           # the answer, X-Request-UUID, X-Request-Stored
EOF
if [ -n "${example:-}" ]; then cat <<EOF
  touch $data/broken                                       # break the API: it answers 500 now
  curl -i -d 'lost?' http://127.0.0.1:8080/calls
  rm $data/broken                                          # mend it
EOF
fi
cat <<EOF
  curl 'http://127.0.0.1:8082/v1/requests?state=replayable'
  HOLDFAST_UPSTREAM_URL=$UPSTREAM HOLDFAST_DATA_DIR=$data bin/replayer plan
  HOLDFAST_UPSTREAM_URL=$UPSTREAM HOLDFAST_DATA_DIR=$data bin/replayer run
  nats stream view HOLDFAST_REQUESTS                       # what was captured, readable
  curl http://127.0.0.1:9090/metrics

Ctrl-C stops it; $data keeps everything.

EOF
wait "$standalone"
