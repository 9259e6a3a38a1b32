#!/usr/bin/env bash
# Everything a machine with a GPU and no network is asked for, in one call: build, tests, benchmarks, sanitizers, a training run.
#
#   bench/gpu.sh [--quick] [--dry-run] [--parts build,smoke,marks,profile,test,bench,sanitize,train]
#                [--families moe,logprob,grpo,step] [--minutes M] [--out DIR] [--archive FILE] [--wheels DIR] [--python PYTHON]
#
# Under ten minutes, with --quick under four, or under M: what takes long gets its share of the time that is left. A step
# that fails or runs out of time does not stop the others, and each family has its own processes, so that a kernel that
# breaks the device takes no other family with it. A step out of time is interrupted as by Ctrl-C, so that its log says where
# it was. The steps stand in the order of what they are worth where the time is cut: does it build, and for this GPU (if not,
# the script ends: times of the wrong kernels are worth nothing), is every kernel right, how fast are ours at the marks, do
# the tests pass, largest risk first, how fast are the others, do the sanitizers find anything, does a user's training run.
# DIR (default gpu-results) gets one log a step as it goes, steps.txt, and marks.json and cuda.json with their .html and .md,
# which hold every case that was finished; the same call with more minutes and --parts bench goes on where it stopped. FILE
# (default DIR.tar.gz) gets all of DIR however the script ends. --wheels: packages to put before the installed ones, such as
# nvidia_cutlass-*.whl. Exit 1 if a step failed. --dry-run goes through all of it on the CPU at tiny shapes. docs/gpu.md says
# what to run first, and why.
set -u
cd "$(dirname "$0")/.."

every=build,smoke,marks,profile,test,bench,sanitize,train
quick=; dry=; out=gpu-results; archive=; wheels=; parts=$every; families=moe,logprob,grpo,step
python=python3; minutes=; device=cuda
while [ $# -gt 0 ]; do
    case $1 in
        --quick) quick=--quick ;;
        --dry-run) dry=1; device=cpu ;;
        --parts | --families | --minutes | --out | --archive | --wheels | --python) printf -v "${1#--}" %s "$2"; shift ;;
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
known --parts "$parts" "$every"
known --families "$families" moe,logprob,grpo,step
[ -n "$minutes" ] || minutes=$([ -n "$quick" ] && echo 3.7 || echo 9.5)

mkdir -p "$out"
out=$(cd "$out" && pwd)
[ -n "$archive" ] || archive=$out.tar.gz
site=$(mktemp -d)
trap 'tar -czf "$archive" -C "$(dirname "$out")" "$(basename "$out")"; rm -rf "$site"' EXIT
trap 'exit 143' TERM INT HUP
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
if [ -n "$wheels" ]; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" "$wheels"/*.whl || exit 1
    PYTHONPATH=$site:$PYTHONPATH
fi
deadline=$(awk "BEGIN { print int($SECONDS + 60 * $minutes) }")
: >"$out/steps.txt"

# step NAME SECONDS COMMAND...: runs it with at most that long, or what is left of the whole; its output goes to NAME.log.
step() {
    local name=$1 limit=$2 start=$SECONDS left=$((deadline - SECONDS)) status
    shift 2
    [ "$left" -lt "$limit" ] && limit=$left
    if [ "$limit" -lt 1 ]; then
        echo "$name: no time left" | tee -a "$out/steps.txt"
        return 1
    fi
    echo "== $name (at most $limit s)"
    timeout -s INT -k 20 "$limit" "$@" >"$out/$name.log" 2>&1
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

# What shares the time: a test or benchmark of a family counts 2, what is as long as a sanitizer 1.
units=0
for family in ${families//,/ }; do
    wants test && [ -n "$(tests_of "$family")" ] && units=$((units + 2))
    wants bench && units=$((units + 2))
done
wants marks && units=$((units + 4))
wants train && units=$((units + 1))
profiler=
wants profile && command -v ncu >/dev/null && profiler=ncu && units=$((units + 1))
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
size=$quick
[ -n "$dry" ] && size=--tiny
# race NAME UNITS ARGUMENT...: a step of that share of the time; the last case to begin has half a minute of it
race() {
    local name=$1
    share "$2"
    shift 2
    step "$name" "$limit" "$python" -m bench run --device "$device" "$@" --limit $((limit > 40 ? limit - 30 : limit / 2))
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
    step hopper 60 "$python" -m bench lease hopper --device "$device" || exit 1
fi

if wants smoke; then
    step experts 100 "$python" -m bench lease experts --device "$device"
    step smoke 150 "$python" -m bench sanitize --device "$device"
fi

if wants marks; then
    step products 60 "$python" -m bench lease products --device "$device"
    race marks 4 ${size:---quick} --ours --out "$out/marks.json"
fi

if [ -n "$profiler" ]; then
    share 1
    step profile "$limit" ncu --clock-control none --set detailed --launch-count 12 \
        --kernel-name 'regex:hopper_.*_kernel|forward_kernel' "$python" -m bench lease profiled --device "$device"
fi
wants profile && [ -z "$profiler" ] && echo "profile: no ncu here" | tee -a "$out/steps.txt"

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
            "$python" -m pytest -m "gpu and not slow" -q -x --durations=10 -p no:cacheprovider "$@"; status=$?
            [ $status = 5 ] && [ -n "$dry" ] || exit $status' test "$python" "$dry" $parallel $files
    done
fi

if wants bench; then
    for family in ${families//,/ }; do
        race "bench-$family" 2 $size --only "$family" --resume --out "$out/$device.json"
    done
fi

for tool in $sanitizers; do
    share 1
    step "sanitize-$tool" "$limit" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" \
        --error-exitcode 9 "$python" -m bench sanitize --device "$device"
done
wants sanitize && [ -z "$sanitizers" ] && echo "sanitize: no compute-sanitizer here" | tee -a "$out/steps.txt"

if wants train; then
    share 1
    # what a user does first; --dry-run of the training command plans it and trains nothing
    step train "$limit" "$python" -m training run tiny --run "$out/run" ${dry:+--dry-run}
fi

deadline=$((deadline + 30))
for name in marks "$device"; do
    [ -f "$out/$name.json" ] || continue
    step "report-$name" 30 "$python" -m bench report "$out/$name.json"
    echo
    cat "$out/report-$name.log"
done

echo
cat "$out/steps.txt"
! grep -qv ": ok, \|^sanitize: no \|^profile: no " "$out/steps.txt"
