# shellcheck shell=bash
# Sourced by the launch scripts: makes .venv and installs what is missing.
#
#   environment [requirements file ...]
#
# Files *-alone.txt are installed last, without what their packages ask for.
#
# PYTHON names the interpreter to make .venv with (default: python3, or one of
# python3.14 to python3.11 where that is too old). A stamp of the requirement files in
# .venv tells whether there is anything to do.

environment() {
  local files=(requirements.txt "$@") options=() alone=()
  local file stamp wanted python
  python=$(find_python) || return 1
  wanted=$(cat "${files[@]}" | cksum)
  stamp=".venv/.installed-$(echo "${files[@]}" | tr ' /' '__')"
  if [[ ! -x .venv/bin/python ]]; then
    echo "making .venv with $("$python" --version)"
    "$python" -m venv .venv
  fi
  if [[ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]]; then
    echo "installing ${files[*]} (a few minutes, once)"
    for file in "${files[@]}"; do
      case "$file" in
        *-alone.txt) alone+=(-r "$file") ;;
        *) options+=(-r "$file") ;;
      esac
    done
    .venv/bin/python -m pip install --quiet --disable-pip-version-check \
      "${options[@]}"
    if ((${#alone[@]})); then
      .venv/bin/python -m pip install --quiet --disable-pip-version-check \
        --no-deps "${alone[@]}"
    fi
    echo "$wanted" >"$stamp"
  fi
  export PATH="$PWD/.venv/bin:$PATH"
}

find_python() {
  local name
  for name in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
    if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
        2>/dev/null; then
      echo "$name"
      return
    fi
  done
  echo "hourjax needs Python 3.11 or newer; set PYTHON=/path/to/python" >&2
  return 1
}
