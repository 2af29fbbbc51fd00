#!/bin/bash
# Many provisions of one small image in a row, some of which fail, panic or are cancelled, and a daemon that is killed now and then:
# in the first half; in the second half one daemon does all, so that what it gathers shows. Prints, as JSON, how the jobs
# ended, and what the daemon had after the first 50 jobs of the second half and at the end.
# usage: BINARY PLACE IMAGE_URL DIGEST JOBS FAULTS SEED; the daemon's settings are in the environment
set -euo pipefail
binary=$1 place=$2 url=$3 digest=$4 jobs=$5 faults=$6
RANDOM=$7
export RUST_BACKTRACE=0
# By its own process id: what it has is looked up by it.
launch=()
. "$(dirname "$0")/daemon.sh"
trap '[ -z "$daemon" ] || kill -KILL "$daemon" 2>/dev/null || true' EXIT

submit() {
  ask /api/v1/provision -H 'Content-Type: application/json' -d "{\"image_url\": \"$url\", \"volume_name\": \"soak-$1\",
    \"size\": 20971520, \"target\": \"files\", \"checksum\": \"sha256:$digest\"}" | jq -r '.job_id // error(tostring)'
}

idle() { until [ "$(ask /health | jq '.active_jobs + .pending_jobs')" = 0 ]; do sleep 0.05; done; }

# Descriptors, threads, and memory in KiB.
had() {
  idle
  jq -cn --argjson descriptors "$(ls "/proc/$daemon/fd" | wc -l)" --argjson threads "$(ls "/proc/$daemon/task" | wc -l)" \
    --argjson memory "$(awk '/^VmRSS/ { print $2 }' "/proc/$daemon/status")" \
    '{descriptors: $descriptors, threads: $threads, memory: $memory}'
}

begun=null
serve "$faults"
for number in $(seq "$jobs"); do
  job=$(submit "$number") || job=
  if [ $((RANDOM % 10)) -eq 0 ] && [ -n "$job" ]; then ask "/api/v1/jobs/$job" -X DELETE -o /dev/null || true; fi
  if [ "$number" -le $((jobs / 2)) ] && [ $((RANDOM % 25)) -eq 0 ]; then
    kill -KILL "$daemon" && wait "$daemon" 2>/dev/null || true
    serve "$faults"
  fi
  [ "$number" -ne $((jobs / 2)) ] || { idle; kill -TERM "$daemon"; wait "$daemon" || true; serve "$faults"; }
  # Not all at once: the queue is not what this is about.
  if [ $((number % 8)) -eq 0 ]; then idle; fi
  # So that it is fetched again and again, too.
  if [ $((number % 16)) -eq 0 ]; then ask "/api/v1/images/sha256:$digest" -X DELETE -o /dev/null || true; fi
  [ "$number" -ne $((jobs / 2 + 50)) ] || begun=$(had)
done
ended=$(had)
kill -TERM "$daemon" && wait "$daemon" || true
serve ''
idle
until grep -q '"looked for leftovers"' <(tail -n 200 "$log"); do sleep 0.02; done
counts=$(sqlite3 "$place/state/jobs.db" "SELECT json_group_object(status, number) FROM (SELECT status, count(*) AS number FROM jobs GROUP BY status)")
jq -cn --argjson begun "$begun" --argjson ended "$ended" --argjson counts "$counts" \
  '{begun: $begun, ended: $ended, counts: $counts}'
for name in $(ask '/api/v1/volumes?target=files' | jq -r '.[].name'); do
  ask "/api/v1/volumes/$name?target=files&force=true" -X DELETE -o /dev/null --fail
done
kill -TERM "$daemon" && wait "$daemon" || true
daemon=
