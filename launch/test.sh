#!/usr/bin/env bash
# Ruff and the tests: bash launch/test.sh [--quick] [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
environment requirements-test.txt requirements-prep.txt

export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu} TF_CPP_MIN_LOG_LEVEL=2
marks=()
if [[ "${1:-}" == --quick ]]; then
  shift
  marks=(-m "not slow")
fi
ruff check .
ruff format --check .
python -m pytest -n 2 --dist loadfile ${marks[@]+"${marks[@]}"} "$@"
