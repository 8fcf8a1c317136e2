#!/usr/bin/env bash
# Build, test and measure on a CUDA machine without a network, within nine minutes. Safe to interrupt:
# the same command goes on where it stopped.
#
#   bench/gpu.sh                    build, gpu-tests, benches, tests; then sanitize, if time is left
#   bench/gpu.sh build benches      only these; also: tune (launch configurations, into kernels/)
#
# The benches go in the order of bench/catalogue.py, the most valuable rows first; then a page with all
# rows is drawn. Rows that are current, in bench/results or OUT, are not measured again.
#
# PYTHON         interpreter that has torch, triton, numpy, pybind11, scikit-build-core (python3)
# OUT            folder of the rows and logs (out/gpu)
# TAPCT_VENV     environment to make, which sees the packages of PYTHON (build/gpu)
# TAPCT_WHEELS   folder of wheels for what PYTHON lacks: blosc2, pydantic, pytest, pillow, liger-kernel, ... (none)
# TAPCT_CUDA     ON; OFF builds without CUDA code
# TAPCT_TOTAL_S  seconds for all steps together (530)
# TAPCT_BENCH    more words for "bench run": names, --tiny (none)
# TAPCT_BENCH_S  seconds for each bench (200)
# TAPCT_JOBS     benches side by side, which compile together and are timed alone (3)
#
# Without blosc2 the native core cannot be built: then only the op library is tested and measured, and
# skipped.txt says so.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
PYTHON=${PYTHON:-python3}
OUT=$(mkdir -p "${OUT:-out/gpu}" && cd "${OUT:-out/gpu}" && pwd) || exit
export OUT TAPCT_CUDA=${TAPCT_CUDA:-ON} TAPCT_REQUIRE_GPU=1 PYTHONUNBUFFERED=1
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
venv=${TAPCT_VENV:-$PWD/build/gpu}
python=$venv/bin/python
failed=()
trap 'echo "interrupted; the same command goes on"; exit 130' INT TERM

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
    "$PYTHON" -c 'import sys; print(*(p for p in sys.path if p.endswith("-packages")), sep="\n")' \
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

left() { echo $((${TAPCT_TOTAL_S:-530} - SECONDS)); }

# timed LOG COMMAND...: within the time that is left.
timed() {
  local log=$1
  shift
  if [ "$(left)" -lt 5 ]; then
    skip "$*: the ${TAPCT_TOTAL_S:-530} s are over"
  else
    run "$log" timeout --signal=INT --kill-after=10 "$(left)" "$@"
  fi
}

# Tests that passed are not run again until a source changes.
pytest_on() {
  local log=$1 done=$OUT/${1%.log}.passed
  shift
  if ! has pytest; then
    skip "${log%.log}: $PYTHON has no pytest and TAPCT_WHEELS brings none"
  elif [ -e "$done" ] && [ -z "$(find kernels tests tapct_fast bench -name '*.py' -newer "$done")" ]; then
    echo "== ${log%.log}: passed already"
  else
    has_native || set -- tests/kernels "$@"
    has xdist && set -- -n "$(nproc)" "$@" # kernels compile for minutes
    local before=${#failed[@]}
    timed "$log" "$python" -m pytest -q --tb=short "$@"
    [ "$before" = ${#failed[@]} ] && touch "$done"
  fi
}

benches() {
  local kept=20 # seconds for the page
  # shellcheck disable=SC2086 # TAPCT_BENCH holds words
  timed bench.log "$python" -m bench run --missing --limit "${TAPCT_BENCH_S:-200}" \
    --jobs "${TAPCT_JOBS:-3}" --total "$(($(left) - kept))" ${TAPCT_BENCH:-}
  if ! has_native; then
    skip "page: no native core; draw it elsewhere with tapct-fast bench plot $OUT"
  elif ! has PIL; then
    skip "page: $PYTHON has no pillow; draw it elsewhere with tapct-fast bench plot $OUT"
  elif compgen -G "$OUT/*.jsonl" > /dev/null; then
    timed bench.log "$python" -m bench plot --out "$OUT/page" "$OUT"
  fi
}

# Kernels under compute-sanitizer, one draw of each: about a hundred times slower than without.
sanitize() {
  local tool sanitizer log=$OUT/sanitize.log folders=(tests/kernels)
  has_native && folders+=(tests/data/test_native_gpu.py)
  sanitizer=$(PATH=${CUDA_HOME:-/usr/local/cuda}/bin:$PATH command -v compute-sanitizer)
  if [ -z "$sanitizer" ]; then
    skip "sanitize: no compute-sanitizer in CUDA_HOME/bin or on PATH"
    return
  elif ! has pytest; then
    skip "sanitize: $PYTHON has no pytest and TAPCT_WHEELS brings none"
    return
  elif [ "$(left)" -lt 90 ]; then
    skip "sanitize: less than 90 s are left"
    return
  elif ! "$sanitizer" --error-exitcode 1 "$python" -c 'import torch; torch.ones(1, device="cuda")' \
    > "$log" 2>&1; then
    skip "sanitize: compute-sanitizer does not run here: $(tail -n 1 "$log")"
    return
  fi
  for tool in memcheck racecheck; do
    if [ "$(left)" -lt 60 ]; then
      skip "sanitize, $tool: less than a minute is left"
      continue
    fi
    # Without torch's cache each tensor is an allocation, so that memcheck knows where it ends.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 TAPCT_DRAWS=1 timeout --signal=INT --kill-after=10 "$(left)" \
      "$sanitizer" --tool "$tool" --error-exitcode 1 \
      "$python" -m pytest -q -x "${folders[@]}" -m gpu \
      -k "kernels_in_bfloat16 or bfloat16_is_the_rounded_float32_on_the_gpu" 2>&1 | tee -a "$log"
    case ${PIPESTATUS[0]} in
      0) ;;
      124 | 137) skip "sanitize, $tool: not done when the ${TAPCT_TOTAL_S:-530} s were over" ;;
      *) failed+=("sanitize, $tool (see $log)") ;;
    esac
  done
}

tune() {
  timed tune.log "$python" -m bench.tune
  cp -r kernels/tapct_kernels/tuned "$OUT" 2> /dev/null
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
for step in "${@:-build gpu-tests benches tests sanitize}"; do
  for word in $step; do
    case $word in
      build) build && has_native && unset PYTHONPATH ;;
      gpu-tests) pytest_on gpu-tests.log -m gpu --continue-on-collection-errors ;;
      benches) benches ;;
      sanitize) sanitize ;;
      tune) tune ;;
      tests) OMP_NUM_THREADS=1 pytest_on tests.log -m "not gpu" ;;
      *) echo "bench/gpu.sh: $word is not one of build, gpu-tests, benches, tests, sanitize, tune" >&2 && exit 2 ;;
    esac
  done
done
ls -l "$OUT"
for what in "${failed[@]}"; do echo "FAILED: $what"; done
[ ${#failed[@]} = 0 ]
