#!/usr/bin/env bash
# Packs the checkout into a tarball: what git tracks or would track.
#
#   pack.sh FILE.tar.gz
set -euo pipefail
out=$1
mkdir -p "$(dirname "$out")"
out=$(cd "$(dirname "$out")" && pwd)/$(basename "$out")
cd "$(dirname "$0")/../.."

# A tracked file may have been deleted here.
existing() {
  local file
  while IFS= read -r -d '' file; do
    if [[ -e $file || -L $file ]]; then printf '%s\0' "$file"; fi
  done
}

# macOS would add a file of attributes beside each file.
export COPYFILE_DISABLE=1
git ls-files -z --cached --others --exclude-standard | existing |
  tar -czf "$out.partial" --null -T -
mv "$out.partial" "$out"
