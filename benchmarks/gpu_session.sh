#!/usr/bin/env bash
# Everything that needs a GPU, in one call of about thirty minutes, or stage by stage:
#
#   benchmarks/gpu_session.sh OUT [build | tests | quick | full | profile | report] ...
#
# OUT receives the logs, the JSON files of the runs and the profiles. Only `report`, which has to be asked for,
# rewrites benchmarks/results and the README; without stages all the others run. A stage that fails or runs out
# of its time does not stop the next one; the status is then 1. `full` takes nine minutes; rows that do not fit
# are listed as absent and keep the figures of `quick`. Nothing is downloaded: Python needs torch for CUDA,
# triton, pybind11, ninja, pytest, pytest-benchmark, matplotlib.
set -u
script=${BASH_SOURCE[0]}
if [ $# -lt 1 ] || [ "${1#-}" != "$1" ]; then
    sed -n '2,10s/^# \{0,1\}//p' "$script" >&2
    exit 2
fi
stages="build tests quick full profile report"
case " $stages " in *" $1 "*)
    echo "$1 is a stage: expected the folder OUT first, such as: $0 runs $*" >&2
    exit 2
    ;;
esac
for name in "${@:2}"; do  # before the first stage, which takes minutes
    case " $stages " in *" $name "*) ;; *)
        echo "$name: expected some of $stages" >&2
        exit 2
        ;;
    esac
done
root=$(cd "$(dirname "$script")/.." && pwd) || exit 2
out=$(mkdir -p "$1" && cd "$1" && pwd) || exit 2
shift
cd "$root" || exit 2
[ $# -gt 0 ] || set -- build tests quick full profile
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python}
failed=()

# stage NAME SECONDS COMMAND...
stage() {
    local name=$1 seconds=$2
    shift 2
    echo "== $name: at most $seconds s"
    local begin=$SECONDS
    if timeout "$seconds" "$@" >"$out/$name.log" 2>&1; then
        echo "   done in $((SECONDS - begin)) s"
    else
        echo "   FAILED or out of time after $((SECONDS - begin)) s; the end of $out/$name.log:"
        tail -n 15 "$out/$name.log"
        failed+=("$name")
    fi
}

for name in "$@"; do
    case $name in
    build)
        nvidia-smi
        stage build 120 env DALLE2_FAST_NATIVE=cuda "$python" setup.py build_ext --inplace
        "$python" -m dalle2_fast info
        ;;
    tests)  # those that run the kernels on a GPU if there is one, and those that need one
        workers=()  # most of the time is compilation, which the workers of pytest-xdist share
        "$python" -c "import xdist" 2>/dev/null && workers=(-n 10)
        stage tests 300 "$python" -m pytest -q "${workers[@]}" -m "not gpu" tests/kernels \
            tests/ops tests/benchmarks
        stage tests-gpu 120 "$python" -m pytest -q -m gpu tests
        ;;
    quick)
        stage quick 540 "$python" -m pytest -q benchmarks/ --benchmark-only --quick \
            --benchmark-json="$out/quick.json"
        ;;
    full)
        stage full 590 "$python" -m pytest -q benchmarks/ --benchmark-only --minutes 9 \
            --benchmark-json="$out/full.json"
        ;;
    profile)
        latest=$(ls -t "$out"/full.json "$out"/quick.json 2>/dev/null | head -n 1)
        stage profile 150 "$python" -m benchmarks.timing.profile_rows "${latest:-$out/quick.json}" \
            --output "$out/profiles"
        ;;
    report)
        runs=()
        for run in quick full; do [ -s "$out/$run.json" ] && runs+=("$out/$run.json"); done
        stage report 60 "$python" -m benchmarks.timing.report "${runs[@]}"
        ;;
    esac
done

if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}"
    exit 1
fi
