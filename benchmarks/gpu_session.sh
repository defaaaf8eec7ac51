#!/usr/bin/env bash
# Everything that needs a GPU, within nine minutes and without a question, the most valuable stages first:
#
#   benchmarks/gpu_session.sh OUT [--dry-run] [check | jobs | ops | losses | profile | report] ...
#
# check:   build the native module, then run the tests of what only a GPU runs                     90 s
# jobs:    caption to images, networks, training steps, patched U-Nets, each with its rivals      240 s
# ops:     the kernels that changed since they were last measured                                  80 s
# losses:  sigmoid, soft targets, and the memory and time of the contrastive loss by batch size    60 s
# profile: the kernels of the decoder and of rows that missed a goal                               45 s
# report:  benchmarks/results and the README; it has to be asked for
#
# OUT receives logs, profiles and session.jsonl, which gets every row as soon as it is measured. A stage that
# fails or runs out of its time does not stop the next one; the status is then 1. --dry-run walks through the
# same stages on a CPU at tiny sizes; it builds nothing, only collects the tests, and reports into OUT. Nothing
# is downloaded: Python needs torch for CUDA, triton, pybind11, ninja, pytest, and for `report` matplotlib.
set -u
script=${BASH_SOURCE[0]}
usage() { sed -n '2,17s/^# \{0,1\}//p' "$script" >&2; }
stages="check jobs ops losses profile report"
dry_run=()
names=()
for argument in "$@"; do  # all are checked before the first stage, which takes minutes
    case $argument in --dry-run) dry_run=(--dry-run) ;; *) names+=("$argument") ;; esac
done
if [ ${#names[@]} -lt 1 ] || [ "${names[0]#-}" != "${names[0]}" ]; then
    usage
    exit 2
fi
case " $stages " in *" ${names[0]} "*)
    echo "${names[0]} is a stage: expected the folder OUT first, such as: $0 runs ${names[*]}" >&2
    exit 2
    ;;
esac
for name in "${names[@]:1}"; do
    case " $stages " in *" $name "*) ;; *)
        echo "$name: expected some of $stages" >&2
        exit 2
        ;;
    esac
done
root=$(cd "$(dirname "$script")/.." && pwd) || exit 2
out=$(mkdir -p "${names[0]}" && cd "${names[0]}" && pwd) || exit 2
cd "$root" || exit 2
wanted=" ${names[*]:1} "
[ ${#names[@]} -gt 1 ] || wanted=" check jobs ops losses profile "
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python}
failed=()

wants() { [[ $wanted == *" $1 "* ]]; }

# stage NAME SECONDS COMMAND...: an interrupt first, so that pytest still says what it found
stage() {
    local name=$1 seconds=$2 begin=$SECONDS
    shift 2
    [ "$seconds" -gt 0 ] || seconds=1
    [ ${#dry_run[@]} -eq 0 ] || seconds=1800  # a CPU that is shared may pause
    echo "== $name: at most $seconds s"
    if timeout -s INT -k 5 "$seconds" "$@" >"$out/$name.log" 2>&1; then
        echo "   done in $((SECONDS - begin)) s"
    else
        echo "   FAILED or out of time after $((SECONDS - begin)) s; the end of $out/$name.log:"
        tail -n 15 "$out/$name.log"
        failed+=("$name")
    fi
}

if wants check; then
    begin=$SECONDS
    pytest=("$python" -m pytest -q)
    ahead=
    if [ ${#dry_run[@]} -gt 0 ]; then
        pytest+=(--collect-only)
    else
        nvidia-smi
        stage build 80 env DALLE2_FAST_NATIVE=cuda "$python" setup.py build_ext --inplace
        "$python" -m dalle2_fast info
        # While the tests run: what torch.compile takes a minute for is then in its cache.
        "$python" -m benchmarks.jobs.session "$out/session.jsonl" jobs:80 --compile-ahead \
            >"$out/ahead.log" 2>&1 &
        ahead=$!
        # Most of the time is compilation, which the workers of pytest-xdist share.
        "$python" -c "import xdist" 2>/dev/null && pytest+=(-n 8)
    fi
    stage tests $((90 - (SECONDS - begin))) "${pytest[@]}" -m gpu tests/kernels tests/csrc tests/diffusion \
        tests/pipeline
    if [ -n "$ahead" ]; then
        kill "$ahead" 2>/dev/null
        wait "$ahead" 2>/dev/null
    fi
fi

timed=() seconds=20  # to start
for entry in jobs:240 ops:80 losses:60; do
    wants "${entry%:*}" && timed+=("$entry") && seconds=$((seconds + ${entry#*:}))
done
if [ ${#timed[@]} -gt 0 ]; then
    [ ${#dry_run[@]} -eq 0 ] || timed=("${timed[@]/%:*/:600}")
    stage session "$seconds" "$python" -m benchmarks.jobs.session "$out/session.jsonl" "${timed[@]}" \
        ${dry_run[@]+"${dry_run[@]}"}
fi

if wants profile; then
    stage profile 45 "$python" -m benchmarks.timing.profile_rows "$out/session.jsonl" \
        --first "decoder forward, batch 2" --output "$out/profiles" ${dry_run[@]+"${dry_run[@]}"}
fi

if wants report; then
    results=()
    [ ${#dry_run[@]} -eq 0 ] || results=(--output "$out/results" --no-plots)  # without --output: README, too
    stage report 60 "$python" -m benchmarks.timing.report "$out/session.jsonl" ${results[@]+"${results[@]}"}
fi

if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}"
    exit 1
fi
