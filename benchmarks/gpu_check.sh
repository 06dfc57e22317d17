#!/usr/bin/env bash
# Everything a CUDA machine without network can tell about this checkout, in under nine minutes:
#
#     benchmarks/gpu_check.sh OUTDIR [PART...]      parts, all by default: build tests report bench profile distil
#
# It needs Python (PYTHON=..., default python3) with torch >= 2.11, numpy, triton, accelerate and pytest, and nvcc. Results go to
# OUTDIR; benchmarks that benchmarks/results holds for this GPU and this code are left out. A part that fails does not stop the
# others; the script ends with 1 then. To publish: copy OUTDIR/results/<gpu>/*.json into benchmarks/results/<gpu>/ and run
# `python -m benchmarks.publish`.
set -u
cd "$(dirname "$0")/.." || exit 2
if [ $# -lt 1 ]; then
  sed -n '2,10s/^# \{0,1\}//p' benchmarks/gpu_check.sh >&2
  exit 2
fi
python=${PYTHON:-python3}
out=$(mkdir -p "$1" && cd "$1" && pwd) || exit 2
shift
parts=${*:-build tests report bench profile distil}
failed=""

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "gpu_check: $python has no torch that sees a CUDA device" >&2
  exit 2
fi

# part SECONDS LOG COMMAND...: run it within a time, and within what is left of nine minutes; its output goes to OUTDIR/LOG.
part() {
  local seconds=$1 log=$2 started=$SECONDS left=$((535 - SECONDS)) status
  shift 2
  [ "$left" -gt 0 ] || { echo "== $log: no time left"; failed="$failed $log"; return; }
  [ "$seconds" -le "$left" ] || seconds=$left
  timeout "$seconds" "$@" >"$out/$log" 2>&1
  status=$?
  tail -n 3 "$out/$log"
  echo "== $log: status $status, $((SECONDS - started)) s"
  [ $status -eq 0 ] || failed="$failed $log"
}

for name in $parts; do
  case $name in
    build) part 120 build.log env MAX_JOBS=8 "$python" setup.py build_ext --inplace ;;
    tests)
      part 160 tests.log "$python" -m pytest -q -m cuda -p no:cacheprovider tests/kernels/test_cuda.py
      part 160 tests_stages.log "$python" -m pytest -q -m cuda -p no:cacheprovider tests/kernels/test_cuda_stages.py
      ;;
    report)
      part 60 report.log "$python" -m benchmarks.compile_report
      part 60 triton_report.log "$python" -m benchmarks.triton_report --main --jobs 12
      ;;
    bench)
      part 150 bench_kernels.log "$python" -m benchmarks --kernels --missing --seconds 110 --out "$out/results"
      for whole in model training_step distillation_step; do
        part 50 "bench_$whole.log" "$python" -m benchmarks --only "$whole" --missing --no-compile --seconds 25 --out "$out/results"
      done
      ;;
    profile) part 60 profile.log "$python" -m benchmarks.step_profile "$out/step_profile.txt" ;;
    distil) part 180 distil.log "$python" -m benchmarks.distillation_run "$out/distillation.json" ;;
    *) echo "gpu_check: no part $name: build tests report bench profile distil" >&2; exit 2 ;;
  esac
done
[ -z "$failed" ] || { echo "FAILED:$failed"; exit 1; }
