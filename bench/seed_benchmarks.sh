#!/usr/bin/env bash
# Repeats the task's benchmarks against a running gateway; see bench/README.md.
set -euo pipefail

readonly MAX_OVERHEAD_MS=100
readonly MIN_RPS=50
readonly MAX_MEMORY_KB=$((2 * 1024 * 1024))

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
readonly here
readonly gateway="$here/../.venv/bin/citadel-gateway"
readonly payload="$here/gateway_payload.json"
base=${BASE_URL:-http://127.0.0.1:8000}
base=${base%/}

usage() {
  cat <<'TEXT'
usage: seed_benchmarks.sh [--start-demo] [--pid PID]

  --start-demo  start `citadel-gateway demo` for the run, and end it afterwards
  --pid PID     the gateway's process; otherwise whoever listens on the port

The gateway is at BASE_URL (default http://127.0.0.1:8000), which must be on this machine.
Exit status: 0 all expectations met, 1 some not, 2 the benchmark could not run.
TEXT
}

die() {
  echo "seed_benchmarks: $*" >&2
  exit 2
}

start_demo=false
pid=
while (($#)); do
  case $1 in
    --start-demo) start_demo=true ;;
    --pid)
      [[ ${2:-} =~ ^[0-9]+$ ]] || die "--pid needs a process id"
      pid=$2
      shift
      ;;
    -h | --help)
      usage
      exit 0
      ;;
    *)
      usage >&2
      exit 2
      ;;
  esac
  shift
done

# Anchored at both ends, so that neither user@host nor a path can lead elsewhere: a load generator
# must not be aimed at another machine by accident.
[[ $base =~ ^http://(127(\.[0-9]{1,3}){3}|localhost|\[::1\])(:([0-9]{1,5}))?$ ]] ||
  die "BASE_URL must be http:// and loopback, not $base"
readonly base port=${BASH_REMATCH[4]:-80}

for program in ab awk curl sort ss; do
  command -v "$program" >/dev/null || die "$program is not installed"
done

work=$(mktemp -d)
readonly work
demo_pid=

finish() {
  if [[ -n $demo_pid ]]; then
    kill -TERM "$demo_pid" 2>/dev/null || true
    for ((i = 0; i < 100; i++)); do
      kill -0 "$demo_pid" 2>/dev/null || break
      sleep 0.1
    done
    kill -KILL "$demo_pid" 2>/dev/null || true
    wait "$demo_pid" 2>/dev/null || true
  fi
  rm -rf "$work"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# No configuration file and no proxy may come between us and loopback.
get() {
  curl -q --noproxy '*' --silent --show-error --max-time 60 "$@"
}

post_chat() {
  get --header 'Content-Type: application/json' --output /dev/null "$@" "$base/v1/chat/completions"
}

failures=0

# report NAME EXPECTED MEASURED CONDITION; the condition is awk's, since figures have fractions.
report() {
  local result=FAIL
  if awk "BEGIN { exit !($4) }"; then result=pass; else failures=$((failures + 1)); fi
  printf '%-4s  %-22s  %-26s  %s\n' "$result" "$1" "$2" "$3" >>"$work/report"
}

# Sum and count over all label sets: "0.123 45", or "0 0" while there are none.
overhead() {
  get --fail "$base/metrics" | awk '
    $1 ~ /^citadel_gateway_overhead_seconds_sum(\{|$)/ { sum += $NF }
    $1 ~ /^citadel_gateway_overhead_seconds_count(\{|$)/ { count += $NF }
    END { printf "%.9f %d\n", sum, count }'
}

if $start_demo; then
  [[ -x $gateway ]] || die "$gateway is missing: run make demo once"
  [[ -z $(ss -Hltn "sport = :$port") ]] || die "port $port is taken: the demo cannot have it"
  "$gateway" demo >"$work/demo.log" 2>&1 </dev/null &
  demo_pid=$!
  for ((i = 0; ; i++)); do
    get --fail --output /dev/null "$base/readyz" 2>/dev/null && break
    if ((i >= 300)) || ! kill -0 "$demo_pid" 2>/dev/null; then
      tail -n 20 "$work/demo.log" >&2
      die "the demo did not become ready at $base"
    fi
    sleep 0.2
  done
fi

get --output /dev/null "$base/readyz" || die "no gateway answers at $base"
overhead >"$work/before" || die "no metrics at $base/metrics"

echo "== Latency: 20 chat requests, one after another"
for ((i = 0; i < 20; i++)); do
  post_chat --data-binary "@$payload" --write-out '%{http_code} %{time_total}\n' \
    >>"$work/latency" || true
done
answered=$(awk '$1 == 200' "$work/latency" | wc -l)
if ((answered > 0)); then
  awk '$1 == 200 { print $2 * 1000 }' "$work/latency" | sort -n | awk '
    { ms[NR] = $1 }
    END {
      middle = NR % 2 ? ms[(NR + 1) / 2] : (ms[NR / 2] + ms[NR / 2 + 1]) / 2
      printf "min %.1f ms, median %.1f ms, max %.1f ms, engine included\n", ms[1], middle, ms[NR]
    }'
fi
report "sequential requests" "20 of 20 answered" "$answered" "$answered == 20"

echo "== Routing: 10 chat requests at once, and the models that answered"
requests=()
for ((i = 1; i <= 10; i++)); do
  body='{"messages": [{"role": "user", "content": "Load test '$i'"}], "max_tokens": 20}'
  post_chat --data-binary "$body" --dump-header "$work/head.$i" &
  requests+=($!)
done
for request in "${requests[@]}"; do
  wait "$request" || true # a request without an answer shows as a missing model below
done
for head in "$work"/head.*; do
  # The last status counts: 100 Continue may come first.
  awk '
    { sub(/\r$/, "") }
    /^HTTP\// { status = $2 }
    tolower($1) == "x-citadel-model:" { model = $2 }
    END { if (status == 200) print model == "" ? "(no x-citadel-model header)" : model }' "$head"
done >"$work/models"
sort "$work/models" | uniq -c
answered=$(wc -l <"$work/models")
spread=$(grep -v '^(' "$work/models" | sort -u | wc -l || true)
configured=$(get --fail "$base/v1/models" | grep -o '"id" *:' | wc -l || true)
# With a single model there is nothing to distribute over.
wanted=$((configured > 1 ? 2 : 1))
report "parallel requests" "10 of 10 answered" "$answered" "$answered == 10"
report "distribution" "$wanted or more models" "$spread of $configured" "$spread >= $wanted"

echo "== Throughput: ab -n 200 -c 20"
if ab -q -n 200 -c 20 -T application/json -p "$payload" "$base/v1/chat/completions" \
  >"$work/ab" 2>"$work/ab.err"; then
  complete=$(awk '/^Complete requests:/ { print $3 }' "$work/ab")
  rps=$(awk '/^Requests per second:/ { print $4 }' "$work/ab")
  # ab also counts answers whose length differs from the first one's; models may do that.
  failed=$(awk '
    /^Failed requests:/ { failed = $3 }
    /^ *\(Connect:/ { gsub(/[^0-9 ]/, ""); failed -= $3 }
    END { print failed + 0 }' "$work/ab")
  refused=$(awk '/^Non-2xx responses:/ { n = $3 } END { print n + 0 }' "$work/ab")
  echo "$rps requests per second, $failed failed, $refused non-2xx"
  report "throughput" "> $MIN_RPS requests/s" "$rps requests/s" "$rps > $MIN_RPS"
  report "failed requests" "0 of 200" "$((200 - complete + failed))" "200 - $complete + $failed == 0"
  report "non-2xx responses" "0 of 200" "$refused" "$refused == 0"
else
  cat "$work/ab.err"
  report "throughput" "> $MIN_RPS requests/s" "ab gave up" 0
fi

echo "== Memory"
if [[ -z $pid ]]; then
  # All distinct: several mean worker processes, and then one figure would be too few.
  listeners=$(ss -Hltnp "sport = :$port" | grep -o 'pid=[0-9]*' | sort -u || true)
  if [[ $(wc -w <<<"$listeners") == 1 ]]; then pid=${listeners#pid=}; fi
fi
if [[ -n $pid && -r /proc/$pid/status ]]; then
  rss=$(awk '/^VmRSS:/ { print $2 }' "/proc/$pid/status")
  peak=$(awk '/^VmHWM:/ { print $2 }' "/proc/$pid/status")
  echo "process $pid: $((rss / 1024)) MiB resident, $((peak / 1024)) MiB at its peak"
  report "memory" "< $((MAX_MEMORY_KB / 1024)) MiB" "$((rss / 1024)) MiB" "$rss < $MAX_MEMORY_KB"
else
  echo "no single process found at port $port: give --pid, or run as its user"
  report "memory" "< $((MAX_MEMORY_KB / 1024)) MiB" "not measured" 0
fi

echo "== Added latency: citadel_gateway_overhead_seconds over the requests above"
overhead >"$work/after" || die "no metrics at $base/metrics"
read -r sum count < <(paste -d ' ' "$work/before" "$work/after" |
  awk '{ printf "%.9f %d\n", $3 - $1, $4 - $2 }')
if ((count > 0)); then
  mean=$(awk "BEGIN { printf \"%.2f\", 1000 * $sum / $count }")
  echo "$mean ms on average of $count requests"
  report "gateway overhead" "< $MAX_OVERHEAD_MS ms (mean)" "$mean ms" "$mean < $MAX_OVERHEAD_MS"
else
  echo "the metric did not move"
  report "gateway overhead" "< $MAX_OVERHEAD_MS ms (mean)" "not measured" 0
fi

echo
cat "$work/report"
((failures == 0))
