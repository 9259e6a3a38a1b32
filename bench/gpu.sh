#!/usr/bin/env bash
# Everything a machine with a GPU and no network is asked for, in one call: build, tests, benchmarks, report.
#
#   bench/gpu.sh [--quick] [--dry-run] [--parts build,test,sanitize,bench] [--out DIR] [--python PYTHON]
#
# Under ten minutes, with --quick under four: each step gets what is left of that. A step that fails or runs out of
# time does not stop the others. DIR (default gpu-results) gets one log a step, cuda.json, cuda.html and cuda.md, which
# hold every case that was finished. --dry-run goes through all of it on the CPU at tiny shapes.
set -u
cd "$(dirname "$0")/.."

quick=; dry=; out=gpu-results; parts=build,test,sanitize,bench; python=python3; minutes=9.5; device=cuda
while [ $# -gt 0 ]; do
    case $1 in
        --quick) quick=--quick; minutes=3.7 ;;
        --dry-run) dry=1; device=cpu ;;
        --parts) parts=$2; shift ;;
        --out) out=$2; shift ;;
        --python) python=$2; shift ;;
        *) echo "gpu.sh: unknown argument $1" >&2; exit 2 ;;
    esac
    shift
done
for part in ${parts//,/ }; do
    case $part in
        build | test | sanitize | bench) ;;
        *) echo "gpu.sh: --parts: expected names out of build,test,sanitize,bench, got $part" >&2; exit 2 ;;
    esac
done

mkdir -p "$out"
out=$(cd "$out" && pwd)
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
deadline=$(awk "BEGIN { print int($SECONDS + 60 * $minutes) }")
: >"$out/steps.txt"

# step NAME SECONDS COMMAND...: runs it with at most that long, or what is left of the whole; its output goes to NAME.log
step() {
    local name=$1 limit=$2 start=$SECONDS left=$((deadline - SECONDS)) status
    shift 2
    [ "$left" -lt "$limit" ] && limit=$left
    if [ "$limit" -lt 1 ]; then
        echo "$name: no time left" | tee -a "$out/steps.txt"
        return 1
    fi
    echo "== $name (at most $limit s)"
    timeout -k 5 "$limit" "$@" >"$out/$name.log" 2>&1
    status=$?
    case $status in
        0) status=ok ;;
        124 | 137) status="out of time" ;;
        *) status="failed ($status)" ;;
    esac
    echo "$name: $status, $((SECONDS - start)) s" | tee -a "$out/steps.txt"
    [ "$status" = ok ] || tail -n 15 "$out/$name.log"
    [ "$status" = ok ]
}

wants() { case ",$parts," in *",$1,"*) true ;; *) false ;; esac }

step machine 60 "$python" -m r1kernels
command -v nvidia-smi >/dev/null && nvidia-smi >>"$out/machine.log" 2>&1

if wants build; then
    cuda=ON
    [ -n "$dry" ] && cuda=OFF
    step build 240 env R1KERNELS_CUDA=$cuda "$python" setup.py build_ext --inplace
    step built 60 "$python" -m r1kernels
fi

if wants test; then
    # without a GPU every one of these tests skips itself, and pytest then finds none to run (5)
    step test 240 sh -c '"$0" -m pytest -m gpu -q -x --durations=5 tests/gpu; status=$?; [ $status = 5 ] && [ -n "$1" ] || exit $status' \
        "$python" "$dry"
fi

if wants sanitize; then
    if command -v compute-sanitizer >/dev/null; then
        for tool in memcheck racecheck synccheck; do
            step "sanitize-$tool" 60 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" \
                --error-exitcode 9 "$python" -m bench.sanitize --device "$device"
        done
    else
        step sanitize 60 "$python" -m bench.sanitize --device "$device"
        echo "sanitize: no compute-sanitizer here: the calls ran without it" | tee -a "$out/steps.txt"
    fi
fi

if wants bench; then
    size=$quick
    [ -n "$dry" ] && size=--tiny
    # a minute less than what is left: the last case has to end, and the report to be written
    step bench $((deadline - SECONDS)) "$python" -m bench run --device "$device" $size --out "$out/$device.json" \
        --limit $((deadline - SECONDS - 45))
    if [ -f "$out/$device.json" ]; then
        deadline=$((deadline + 20))
        step report 20 "$python" -m bench report "$out/$device.json"
        echo
        cat "$out/report.log"
    fi
fi

echo
cat "$out/steps.txt"
! grep -qv ": ok, \|^sanitize: no " "$out/steps.txt"
