#!/usr/bin/env bash
# Build, test and measure on a CUDA machine without a network; what is interrupted goes on where it stopped.
#
#   bench/gpu.sh                    all steps: build, gpu-tests, benches, tests
#   bench/gpu.sh build benches      only these
#
# PYTHON         interpreter that has torch, triton, numpy, pybind11, scikit-build-core (python3)
# OUT            folder of the rows and logs (out/gpu)
# TAPCT_WHEELS   folder of wheels for what PYTHON lacks: blosc2, pydantic, pytest, nibabel, ... (none)
# TAPCT_CUDA     ON; OFF builds without CUDA code
# TAPCT_TEST_S   limit of each test step in seconds (300)
#
# Packages go into an environment of their own, build/gpu, that sees those of PYTHON. Without blosc2 the
# native core cannot be built: then only the op library is tested and measured, and skipped.txt says so.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
PYTHON=${PYTHON:-python3}
OUT=$(mkdir -p "${OUT:-out/gpu}" && cd "${OUT:-out/gpu}" && pwd) || exit
export OUT TAPCT_CUDA=${TAPCT_CUDA:-ON} TAPCT_REQUIRE_GPU=1 PYTHONUNBUFFERED=1
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
venv=$PWD/build/gpu
python=$venv/bin/python
failed=()

# run LOG COMMAND...: a failure is reported at the end, and the next step still runs.
run() {
  local log=$OUT/$1
  shift
  echo "== $*" | tee -a "$log"
  "$@" 2>&1 | tee -a "$log"
  [ "${PIPESTATUS[0]}" = 0 ] || failed+=("$* (see $log)")
}
skip() { echo "skipped: $*" | tee -a "$OUT/skipped.txt"; }
has() { "$python" -c "import importlib.util as u, sys; sys.exit(u.find_spec('$1') is None)"; }

make_environment() {
  if ! [ -x "$python" ]; then
    "$PYTHON" -m venv --without-pip "$venv" || exit
    # PYTHON may itself live in an environment, which --system-site-packages would not see.
    "$PYTHON" -c 'import site; print(*site.getsitepackages(), sep="\n")' \
      > "$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/parent.pth"
  fi
  PATH=$venv/bin:$(dirname "$("$PYTHON" -c 'import sys; print(sys.executable)')"):$PATH
  if [ -n "${TAPCT_WHEELS:-}" ]; then
    run build.log "$python" -m pip install -q --no-index --no-deps --no-compile "$TAPCT_WHEELS"/*.whl
  fi
}

build() {
  if ! has blosc2; then
    skip "native core: $PYTHON has no blosc2 and TAPCT_WHEELS brings none"
    return
  fi
  run build.log "$python" -m pip install -v --no-build-isolation --no-deps --no-index -e .
}

# Where the native core is missing, the op library stands alone.
has_native() { has tapct_fast && "$python" -c "import tapct_fast._native" 2> /dev/null; }

pytest_on() {
  local log=$1
  shift
  if ! has pytest; then
    skip "${log%.log}: $PYTHON has no pytest and TAPCT_WHEELS brings none"
    return
  fi
  has_native || set -- tests/kernels "$@"
  run "$log" timeout "${TAPCT_TEST_S:-300}" "$python" -m pytest -q "$@"
}

benches() {
  local file name
  for file in bench/*.py; do
    name=$(basename "$file" .py)
    grep -qE '"cuda"|op_bench' "$file" && grep -qE '^(def main\(|main = )' "$file" || continue # the others need real CT
    if grep -q '^from tapct_fast' "$file" && ! has_native; then
      skip "bench $name: no native core"
    else
      run bench.log timeout 240 "$python" -m "bench.$name" --missing
    fi
  done
}

make_environment
has_native || export PYTHONPATH=$PWD/kernels
"$python" - << 'END' || exit 2
import sys
try:
    import torch, triton
except ImportError as error:
    sys.exit(f"bench/gpu.sh: {error}; set PYTHON to an interpreter that has torch and triton")
device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
print(f"torch {torch.__version__}, triton {triton.__version__}, {device}")
END
for step in "${@:-build gpu-tests benches tests}"; do
  for word in $step; do
    case $word in
      build) build && has_native && unset PYTHONPATH ;;
      gpu-tests) pytest_on gpu-tests.log -m gpu ;;
      benches) benches ;;
      tests) OMP_NUM_THREADS=1 pytest_on tests.log -m "not gpu" ;;
      *) echo "bench/gpu.sh: $word is not one of build, gpu-tests, benches, tests" >&2 && exit 2 ;;
    esac
  done
done
ls -l "$OUT"
for what in "${failed[@]}"; do echo "FAILED: $what"; done
[ ${#failed[@]} = 0 ]
