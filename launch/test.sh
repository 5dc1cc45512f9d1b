#!/usr/bin/env bash
# Ruff, types and the tests: bash launch/test.sh [--quick] [--eval] [pytest arguments]
#
# --quick leaves the long tests out; --eval also installs what lmms-eval needs
# (PyTorch among it), without which its tests are skipped.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
extras=(test prep hub construct)
marks=()
while [[ "${1:-}" == --quick || "${1:-}" == --eval ]]; do
  case "$1" in
    --quick) marks=(-m "not slow") ;;
    --eval) extras+=(eval) ;;
  esac
  shift
done
environment "${extras[@]}"

export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu} TF_CPP_MIN_LOG_LEVEL=2
ruff check .
ruff format --check .
pyrefly check --output-format min-text
# Programs of the tests are compiled in a third of the time, with fewer
# optimizations (tests/xla_flags.py); as for users where digits are compared with
# the official ones, or bits between two programs.
full=(tests/test_golden_model.py tests/models/test_params.py)
others=()
if (($# == 0)); then
  HOURJAX_TESTS_XLA=full python -m pytest -n 2 --dist loadfile \
    ${marks[@]+"${marks[@]}"} "${full[@]}"
  others=("${full[@]/#/--ignore=}")
fi
# Files in the order that tests/conftest.py gives them, the longest first.
python -m pytest -n 2 --dist loadfile --no-loadscope-reorder \
  ${marks[@]+"${marks[@]}"} ${others[@]+"${others[@]}"} "$@"
