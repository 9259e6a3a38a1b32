#!/usr/bin/env bash
# Everything a machine with a GPU and no network is asked for, in one call: build, tests, benchmarks, sanitizers, report.
#
#   bench/gpu.sh [--quick] [--dry-run] [--parts build,smoke,test,bench,sanitize] [--families logprob,grpo,moe,step]
#                [--minutes M] [--out DIR] [--python PYTHON]
#
# Under ten minutes, with --quick under four, or under M: what takes long gets its share of the time that is left. A step
# that fails or runs out of time does not stop the others, and each family has its own processes, so that a kernel that
# breaks the device takes no other family with it. The steps stand in the order of what they are worth where the time is
# cut: does it build, does every kernel run at all, do the tests pass, how fast is it, do the sanitizers find anything.
# DIR (default gpu-results) gets one log a step as it goes, steps.txt, and cuda.json, cuda.html and cuda.md, which hold
# every case that was finished; the same call with more minutes and --parts bench goes on where it stopped. Exit 1 if a
# step failed. --dry-run goes through all of it on the CPU at tiny shapes. docs/gpu.md says what to run first, and why.
set -u
cd "$(dirname "$0")/.."

quick=; dry=; out=gpu-results; parts=build,smoke,test,bench,sanitize; families=logprob,grpo,moe,step
python=python3; minutes=; device=cuda
while [ $# -gt 0 ]; do
    case $1 in
        --quick) quick=--quick ;;
        --dry-run) dry=1; device=cpu ;;
        --parts) parts=$2; shift ;;
        --families) families=$2; shift ;;
        --minutes) minutes=$2; shift ;;
        --out) out=$2; shift ;;
        --python) python=$2; shift ;;
        *) echo "gpu.sh: unknown argument $1" >&2; exit 2 ;;
    esac
    shift
done
# known NAME GIVEN ALLOWED: ends the script where a name is none of those allowed
known() {
    local word
    for word in ${2//,/ }; do
        case ",$3," in
            *",$word,"*) ;;
            *) echo "gpu.sh: $1: expected names out of $3, got $word" >&2; exit 2 ;;
        esac
    done
}
known --parts "$parts" build,smoke,test,bench,sanitize
known --families "$families" logprob,grpo,moe,step
[ -n "$minutes" ] || minutes=$([ -n "$quick" ] && echo 3.7 || echo 9.5)

mkdir -p "$out"
out=$(cd "$out" && pwd)
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
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

wants() { case ",$parts," in *",$1,"*) true ;; *) false ;; esac; }

# tests_of FAMILY: the files under tests/gpu that belong to it; with "step" go those that belong to no other
tests_of() {
    case $1 in
        logprob) ls tests/gpu/test_*logprob*_gpu.py ;;
        grpo | moe) ls tests/gpu/test_"$1"_*gpu.py ;;
        step) ls tests/gpu/test_*_gpu.py | grep -v 'logprob\|/test_grpo_\|/test_moe_' ;;
    esac 2>/dev/null
}

# What shares the time: a test or benchmark of a family counts 2, a sanitizer 1.
units=0
for family in ${families//,/ }; do
    wants test && [ -n "$(tests_of "$family")" ] && units=$((units + 2))
    wants bench && units=$((units + 2))
done
sanitizers=
if wants sanitize && command -v compute-sanitizer >/dev/null; then
    sanitizers="memcheck racecheck synccheck"
    units=$((units + 3))
fi
# share UNITS: sets `limit` to that part of the time that is left, in seconds, and takes the units away
share() {
    limit=$(((deadline - SECONDS - 5) * $1 / units))
    [ "$limit" -ge 0 ] || limit=0
    units=$((units - $1))
}

step machine 60 "$python" -m r1kernels
{ nvidia-smi; nvcc --version; nproc; free -g; } >>"$out/machine.log" 2>&1

if wants build; then
    cuda=ON
    [ -n "$dry" ] && cuda=OFF
    # the architecture of this machine alone: the others cost minutes
    architecture=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())' 2>/dev/null)
    step build 300 env R1KERNELS_CUDA=$cuda R1KERNELS_CUDA_ARCHITECTURES="$architecture" \
        "$python" setup.py build_ext --inplace
    step built 60 "$python" -m r1kernels
fi

wants smoke && step smoke 150 "$python" -m bench.sanitize --device "$device"

if wants test; then
    # Triton compiles most of the time: several processes; large tests wait for each other
    parallel=
    "$python" -c 'import xdist' 2>/dev/null && parallel="-n 6"
    for family in ${families//,/ }; do
        files=$(tests_of "$family")
        [ -n "$files" ] || continue
        share 2
        # without a GPU every one of these tests skips itself, and pytest then finds none to run (5)
        # shellcheck disable=SC2086
        step "test-$family" "$limit" sh -c '
            python=$1 dry=$2; shift 2
            "$python" -m pytest -m "gpu and not slow" -q --maxfail=20 --durations=10 -p no:cacheprovider "$@"; status=$?
            [ $status = 5 ] && [ -n "$dry" ] || exit $status' test "$python" "$dry" $parallel $files
    done
fi

if wants bench; then
    size=$quick
    [ -n "$dry" ] && size=--tiny
    for family in ${families//,/ }; do
        # the last case to begin has half a minute of it
        share 2
        step "bench-$family" "$limit" "$python" -m bench run --device "$device" $size --only "$family" \
            --resume --out "$out/$device.json" --limit $((limit > 40 ? limit - 30 : limit / 2))
    done
fi

for tool in $sanitizers; do
    share 1
    step "sanitize-$tool" "$limit" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" \
        --error-exitcode 9 "$python" -m bench.sanitize --device "$device"
done
wants sanitize && [ -z "$sanitizers" ] && echo "sanitize: no compute-sanitizer here" | tee -a "$out/steps.txt"

if wants bench && [ -f "$out/$device.json" ]; then
    deadline=$((deadline + 30))
    step report 30 "$python" -m bench report "$out/$device.json"
    echo
    cat "$out/report.log"
fi

echo
cat "$out/steps.txt"
! grep -qv ": ok, \|^sanitize: no " "$out/steps.txt"
