#!/usr/bin/env bash
# The reference of all modules, generated from their docstrings:
#
#   bash launch/docs.sh [FOLDER]     (default: work/docs; open index.html)
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
environment docs construct  # whose modules import what it needs

JAX_PLATFORMS=cpu HOURJAX_COMPILATION_CACHE=off \
  python -m launch.docs "${1:-work/docs}"
