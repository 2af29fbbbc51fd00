# The daemon of a place: started with faults, asked by its socket. For scripts that set `binary` and `place`, and in `launch` the
# words before the binary, if any. Its process id is in `daemon`, its log at `log`.
log=$place/log
export LVP_STATE_DIR=$place/state LVP_CACHE_DIR=$place/cache LVP_SOCKET=$place/socket LVP_CONFIG=$place/config.toml
export LOG_FORMAT=json PORT=${PORT:-8081}
daemon=

ask() {
  local path=$1
  shift
  curl -sS --max-time 150 --unix-socket "$place/socket" "$@" "http://lvp$path"
}

serve() {
  FAILPOINTS=$1 setsid "${launch[@]}" "$binary" serve </dev/null >>"$log" 2>&1 &
  daemon=$!
  until ask /livez -o /dev/null 2>/dev/null; do
    kill -0 "$daemon" 2>/dev/null || { echo "the daemon did not come up" >&2; tail -n 5 "$log" >&2; exit 1; }
    sleep 0.02
  done
}
