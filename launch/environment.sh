# shellcheck shell=bash
# Sourced by the launch scripts: makes .venv and installs what is missing.
#
#   environment [extra ...]
#
# installs requirements.txt and the named extras of pyproject.toml, at the
# versions pinned there. hourjax itself is not installed: Python is started in
# the checkout.
#
# PYTHON names the interpreter to make .venv with (default: python3, or one of
# python3.14 to python3.11 where that is too old). .venv/.installed-NAME holds
# the checksum of what was installed under that name, so that nothing is done,
# and no network is needed, until a pin changes.

# Goes with the extra `eval`, without what it asks for: see pyproject.toml.
LMMS_EVAL=lmms_eval==0.7.3

environment() {
  local python name pins pin stale=() arguments=(-r requirements.txt)
  if [[ ! -x .venv/bin/python ]]; then
    python=$(find_python) || return 1
    echo "making .venv with $("$python" --version)"
    "$python" -m venv .venv
  fi
  for name in runtime "$@"; do
    pins=$(pins_of "$name") || return 1
    if [[ "$(cat ".venv/.installed-$name" 2>/dev/null)" == \
      "$(checksum "$pins")" ]]; then continue; fi
    stale+=("$name")
    while read -r pin; do
      if [[ $pin ]]; then arguments+=("$pin"); fi
    done <<<"$pins"
  done
  if ((${#stale[@]})); then
    echo "installing ${stale[*]} (a few minutes, once)"
    install_pins "${arguments[@]}"
    if [[ " ${stale[*]} " == *" eval "* ]]; then
      install_pins --no-deps "$LMMS_EVAL"
    fi
    for name in "${stale[@]}"; do
      checksum "$(pins_of "$name")" >".venv/.installed-$name"
    done
  fi
  export PATH="$PWD/.venv/bin:$PATH"
}

# The packages of an extra, one a line; none for "runtime", requirements.txt.
pins_of() {
  if [[ $1 == runtime ]]; then return; fi
  .venv/bin/python - "$1" <<'END'
import sys
import tomllib

with open("pyproject.toml", "rb") as file:
  extras = tomllib.load(file)["project"]["optional-dependencies"]
if sys.argv[1] not in extras:
  sys.exit(
    f"pyproject.toml has no extra {sys.argv[1]}; it has {', '.join(extras)}"
  )
print("\n".join(extras[sys.argv[1]]))
END
}

# An extra is installed anew when requirements.txt changes, too.
checksum() { (cat requirements.txt && echo "$1" "$LMMS_EVAL") | cksum; }

install_pins() {
  .venv/bin/python -m pip install --quiet --disable-pip-version-check "$@"
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
