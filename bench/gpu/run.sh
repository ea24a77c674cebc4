#!/bin/bash
# Builds the kernels for the GPU of this machine, proves them right on it, and measures them: nine minutes at most.
#
#   bash bench/gpu/run.sh              writes bench/gpu/RESULTS.md
#   bash bench/gpu/run.sh --emulated   the same steps on small shapes, without a GPU; writes build/gpu/RESULTS.md
#
# Needs nvcc, and in the environment of $PYTHON (default: python3) PyTorch, NumPy, setuptools and pybind11; TensorFlow is
# not asked for. pytest and ml_dtypes, for the tests, setuptools from 77 on, and FBGEMM, a peer, are installed into
# build/gpu/packages if they are not there and can be had.
set -u
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3}
OUT=build/gpu
mkdir -p $OUT/packages
export PYTHONPATH="$PWD:$PWD/$OUT/packages${PYTHONPATH:+:$PYTHONPATH}"
EMULATED=
[ "${1:-}" = --emulated ] && EMULATED=--emulated
rm -f $OUT/*.txt $OUT/*.json
began=$SECONDS

# step NAME LIMIT COMMAND...: one line of what came of it, for the screen and the report.
step() {
  local name=$1 limit=$2 start=$SECONDS status
  shift 2
  timeout "$limit" "$@" >"$OUT/$name.log" 2>&1
  status=$?
  local outcome=done
  [ $status -ne 0 ] && outcome="failed with status $status: $(grep -aE 'rror|failed' "$OUT/$name.log" | tail -1 | cut -c1-200)"
  [ $status -eq 124 ] && outcome="stopped after $limit s"
  echo "$name: $outcome ($((SECONDS - start)) s)$(tail -1 "$OUT/$name.log" | grep -aoE '^[^/]* (passed|failed).*' | sed 's/^/: /')" |
    tee -a $OUT/steps.txt
  return $status
}

has() { $PYTHON -c "import $1" 2>/dev/null; }
install() { step "install-${1%%[<>=]*}" 30 $PYTHON -m pip install -q --upgrade --target $OUT/packages "$1"; }

for package in pytest ml_dtypes; do
  has $package || install $package
done
# What reads pyproject.toml's licence as it is written there.
$PYTHON -c "import setuptools; assert int(setuptools.__version__.split('.')[0]) >= 77" 2>/dev/null || install "setuptools>=77"
export DEEPFM_OPS_BUILD=kernels
if [ -z "$EMULATED" ]; then
  export DEEPFM_OPS_TEST_GPU=1 DEEPFM_OPS_CUDA=1
  DEEPFM_OPS_CUDA_ARCHITECTURES=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d .)
  export DEEPFM_OPS_CUDA_ARCHITECTURES
  step build 150 $PYTHON setup.py -q build_ext --inplace || exit 1
else
  export DEEPFM_OPS_CUDA=0 DEEPFM_OPS_FUZZ_CALLS=80
  $PYTHON -c "from deepfm_ops import kernels" 2>/dev/null || step build 400 $PYTHON setup.py -q build_ext --inplace || exit 1
fi
limit=110
[ -n "$EMULATED" ] && limit=300  # it is compiled first
tests=(-m pytest -q -p no:cacheprovider --confcutdir=tests/cuda tests/cuda/test_cases.py)
[ -n "$EMULATED" ] && tests+=(tests/cuda/test_dlpack.py)
has pytest && has ml_dtypes && step tests $limit $PYTHON "${tests[@]}"
if [ -z "$EMULATED" ] && command -v compute-sanitizer >/dev/null && has pytest; then
  for tool in memcheck racecheck; do
    DEEPFM_OPS_FUZZ_CALLS=80 step $tool 35 compute-sanitizer --tool $tool --error-exitcode 9 $PYTHON "${tests[@]}" \
      -x -k "hand or first_order or nothing_is_legal or random_forwards"
  done
fi
if [ -z "$EMULATED" ] && ! has fbgemm_gpu; then
  step install-fbgemm 40 $PYTHON -m pip install -q --no-deps --target $OUT/packages fbgemm-gpu
fi
left=$((530 - (SECONDS - began)))
[ -n "$EMULATED" ] && left=300
step measure $((left < 220 ? left : 220)) \
  $PYTHON bench/gpu/measure.py --json $OUT/results.json $EMULATED
tail -40 $OUT/measure.log
to=bench/gpu/RESULTS.md
[ -n "$EMULATED" ] && to=$OUT/RESULTS.md
$PYTHON bench/gpu/report.py --json $OUT/results.json --steps $OUT/steps.txt --output $to
echo "$to, $((SECONDS - began)) s"
