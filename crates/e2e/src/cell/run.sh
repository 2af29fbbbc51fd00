#!/bin/bash
# One provision with a fault in it: a daemon that meets the fault, then one that meets none and finishes or takes back what
# the first one left. Prints how often the point was passed and the job as it ended.
# It leaves out what was there before and is there afterwards: audit.sh.
# usage: BINARY PLACE REQUEST FAULTS POINT cancel|kill|error|panic|none; the daemon's settings are in the environment
set -euo pipefail
binary=$1 place=$2 request=$3 faults=$4 point=$5 action=$6
wait=$place/wait events=$place/events
# It does not outlive its cell, however that ends.
launch=(timeout --signal=KILL 200)
. "$(dirname "$0")/daemon.sh"

stop() {
  kill -TERM "$daemon" 2>/dev/null || true
  wait "$daemon" 2>/dev/null || true
}
# However this ends, nothing is left running.
trap '[ -z "$daemon" ] || kill -TERM "$daemon" 2>/dev/null || true' EXIT

newest() { ask '/api/v1/jobs?limit=1' | jq -r '.jobs[0].job_id'; }

rm -f "$wait"
serve "$faults"
# A daemon that is killed may do so before it has answered.
job=$(ask /api/v1/provision -H 'Content-Type: application/json' -d "$request" | jq -r '.job_id // error(tostring)') || true
if [ -n "$job" ]; then
  ask "/api/v1/jobs/$job/events" -N -o "$events" 2>/dev/null &
  follower=$!
  if [ "$action" = cancel ]; then
    until [ -e "$wait" ] || ! kill -0 "$follower" 2>/dev/null; do sleep 0.02; done
    ask "/api/v1/jobs/$job" -X DELETE -o /dev/null
    rm -f "$wait"
  fi
  wait "$follower" || true
fi
# A daemon that was to be killed has ended by itself; one that did not come to the point is stopped as any other.
[ "$action" = kill ] && ! ask /livez -o /dev/null 2>/dev/null || stop
wait "$daemon" 2>/dev/null || true

sweeps=$(($(grep -c '"looked for leftovers"' "$log" || true) + 1))
serve ''
[ -n "$job" ] || job=$(newest)
ask "/api/v1/jobs/$job/events" -N -o "$events"
# It has looked for what was left of jobs that could not be taken back.
until [ "$(grep -c '"looked for leftovers"' "$log")" -ge "$sweeps" ]; do sleep 0.02; done
jq -cn --argjson job "$(ask "/api/v1/jobs/$job")" --argjson passed "$(grep -c "\"point\":\"$point\"" "$log" || true)" \
  --argjson points "$(grep -o '"point":"[^"]*"' "$log" | cut -d'"' -f4 | jq -Rcn '[inputs]')" \
  '{job: $job, passed: $passed, points: $points}'
stop
daemon=
