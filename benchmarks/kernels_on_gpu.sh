#!/usr/bin/env bash
# What the kernels are to be measured by on a GPU, in one command; what is worth most comes first, and each step stands alone:
#   benchmarks/kernels_on_gpu.sh                       every step, logs and rows in benchmarks/results
#   STEPS="parity quick sweep" benchmarks/kernels_on_gpu.sh    the steps of a quarter of an hour
#   DRY=1 benchmarks/kernels_on_gpu.sh                 prints the commands and runs none
# A step that fails, takes longer than LIMIT seconds, or lacks its tool, says so and does not keep the others from running.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python} OUT=${OUT:-benchmarks/results} LIMIT=${LIMIT:-3600} DRY=${DRY:-}
STEPS=${STEPS:-parity quick sweep bench soak memcheck racecheck nsight}
NSIGHT_CASES="b-stage1 b-stage3"
failed=0

run() {  # name of the log, command
    local log="$OUT/$1.log"
    shift
    echo "+ $*"
    [ -z "$DRY" ] || return 0
    command -v "$1" >/dev/null || { echo "not run: $1 is not installed"; failed=1; return 0; }
    timeout "$LIMIT" "$@" >"$log" 2>&1 || { echo "failed or out of time: see $log"; failed=1; }
    tail -n 3 "$log"
}

[ -n "$DRY" ] || mkdir -p "$OUT"
for step in $STEPS; do
    case $step in
        parity) run parity "$PYTHON" -m pytest -q tests/kernels -m "not slow" ;;  # bf16 included; 1,000 launches
        quick) run quick "$PYTHON" -m benchmarks.kernels --providers eager sdpa bevt_ds --out "$OUT" ;;
        sweep) run sweep "$PYTHON" -m benchmarks.kernels --sweep --out "$OUT" ;;
        bench) run bench "$PYTHON" -m benchmarks.kernels --out "$OUT" ;;
        soak) run soak "$PYTHON" -m benchmarks.kernels --soak ;;
        memcheck | racecheck)
            run "$step" compute-sanitizer --tool "$step" --error-exitcode 1 "$PYTHON" -m benchmarks.kernels --soak 1 ;;
        nsight)
            for case in $NSIGHT_CASES; do
                run "nsight-$case" ncu --set full -k regex:window_attention -c 24 \
                    "$PYTHON" -m benchmarks.kernels --only "$case" --providers bevt_ds --out "$OUT/under-nsight"
            done ;;
        *) echo "no step $step: choose of parity quick sweep bench soak memcheck racecheck nsight"; exit 2 ;;
    esac
done
exit $failed
