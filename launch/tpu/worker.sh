#!/usr/bin/env bash
# One worker's side of launch/tpu_vm.py, which runs it over ssh:
#
#   worker.sh install               puts unpacked code and .venv into place
#   worker.sh prepare COMMAND       a shell's line, before a start
#   worker.sh start ID COMMAND...   starts it detached from the connection
#   worker.sh state                 one line, see `state` below
#   worker.sh stop SECONDS [kill]   SIGTERM and wait; kill: then SIGKILL
#   worker.sh log LINE              the newest run's log from a line on
#   worker.sh follow LINE           the same, until the run ends
#   worker.sh with FILE COMMAND...  COMMAND with the variables of a file
#
# Everything lies in ~/hourjax: code/, logs/ID.log, and run/ with facts of the
# newest run. A run holds a lock on run/lock for as long as it lives, so that
# neither a crash nor a reused process number is mistaken for one.
set -euo pipefail
home=$HOME/hourjax
run=$home/run

fail() { echo "worker: $2" >&2; exit "$1"; }

known() { cat "$run/$1" 2>/dev/null || true; }

busy() { [[ -e $run/lock ]] && ! flock --nonblock "$run/lock" true; }

# Prints one of: absent (not set up), none, running ID PID,
# ended ID CODE [stopped | signalled], lost ID (died without a word).
state() {
  local id result
  id=$(known id)
  read -r -a result <<<"$(known exit)"
  if busy; then
    echo "hourjax-state: running $id $(known pid)"
  elif [[ ! -e $home/ready ]]; then
    echo "hourjax-state: absent"
  elif [[ -z $id ]]; then
    echo "hourjax-state: none"
  elif [[ ${result[0]:-} != "$id" ]]; then
    echo "hourjax-state: lost $id"
  elif [[ $(known stopped) == "$id" ]]; then
    echo "hourjax-state: ended $id ${result[1]} stopped"
  else
    echo "hourjax-state: ended ${result[*]}"
  fi
}

# A Python that can make .venv. The images have 3.10; uv brings a newer one
# without root.
usable_python() {
  local python
  if python=$(find_python 2>/dev/null) &&
    "$python" -c 'import ensurepip' 2>/dev/null; then
    echo "$python"
    return
  fi
  python3 -m pip install --quiet --upgrade --target "$home/uv" uv==0.13.9 >&2
  "$home/uv/bin/uv" python install --quiet 3.11 >&2
  "$home/uv/bin/uv" python find 3.11
}

install() {
  if busy; then fail 75 "$(known id) runs here; stop it before setup"; fi
  rm -f "$home/ready"
  if [[ -d $home/code/.venv ]]; then mv "$home/code/.venv" "$home/next/.venv"; fi
  rm -rf "$home/code"
  mv "$home/next" "$home/code"
  cd "$home/code"
  # shellcheck source=launch/environment.sh
  source launch/environment.sh
  PYTHON=$(usable_python)
  export PYTHON
  # shellcheck disable=SC2119  # no extras
  environment
  touch "$home/ready"
}

# To mount storage or copy data: at every start, for a machine may have rebooted.
prepare() {
  cd "$home/code"
  PATH="$PWD/.venv/bin:$PATH" bash -euo pipefail -c "$1"
}

# Asked twice for the same ID, as after a lost connection, it starts once.
start() {
  local id=$1 i
  shift
  [[ -e $home/ready ]] || fail 3 "not set up"
  mkdir -p "$run" "$home/logs"
  if [[ $(known id) == "$id" ]]; then
    state
    return
  fi
  exec 9>"$run/lock"
  flock --nonblock 9 || fail 75 "$(known id) runs here already"
  rm -f "$run"/{pid,exit,stopped}
  echo "$id" >"$run/id"
  cd "$home/code"
  export PATH="$PWD/.venv/bin:$PATH" PYTHONUNBUFFERED=1
  # Without a TPU it shall fail and not train on the host's CPU.
  export JAX_PLATFORMS=${JAX_PLATFORMS:-tpu,cpu}
  setsid nohup bash launch/tpu/worker.sh watch "$id" "$@" \
    >"$home/logs/$id.log" 2>&1 </dev/null &
  exec 9>&-
  for ((i = 0; i < 100; i++)); do
    if [[ -s $run/pid ]]; then break; fi
    sleep 0.1
  done
  state
}

# The process around a run, which notes how it ended. It inherits the lock and
# hands it on. Shutting the VM down signals it too; `stop` does not.
watch() {
  local id=$1 pid seen code="" result signals=0
  shift
  trap 'signals=$((signals + 1))' TERM INT HUP
  echo "$$" >"$run/group"
  "$@" &
  pid=$!
  echo "$pid" >"$run/pid"
  while :; do
    seen=$signals result=0
    wait "$pid" || result=$?
    # 127 for a child that the round before has waited for.
    if [[ -n $code && $result == 127 ]]; then break; fi
    code=$result
    if ((seen == signals)); then break; fi
  done
  if ((signals)); then code="$code signalled"; fi
  echo "$id $code" >"$run/exit.partial"
  mv "$run/exit.partial" "$run/exit"
}

stop() {
  local seconds=$1 end
  end=$((SECONDS + seconds))
  if busy; then
    known id >"$run/stopped"
    kill -TERM "$(known pid)" 2>/dev/null || true
  fi
  while busy && ((SECONDS < end)); do sleep 0.2; done
  if busy && [[ ${2:-} == kill ]]; then
    kill -KILL -- "-$(known group)" 2>/dev/null || true
    while busy; do sleep 0.2; done
    echo "$(known id) 137" >"$run/exit"
  fi
  state
}

log() {
  local id
  id=$(known id)
  [[ -n $id ]] || fail 3 "nothing ran here yet"
  tail -n "+$1" "$home/logs/$id.log"
}

follow() {
  local id
  id=$(known id)
  [[ -n $id ]] || fail 3 "nothing ran here yet"
  if busy; then
    exec tail --pid="$(known group)" -n "+$1" -f "$home/logs/$id.log"
  fi
  log "$1"
}

# Lines are KEY=VALUE, taken as they stand; empty ones and # are left out.
with() {
  local file=$1 line
  shift
  while IFS= read -r line || [[ -n $line ]]; do
    if [[ -n $line && $line != \#* ]]; then export "${line?}"; fi
  done <"$file"
  exec "$@"
}

"$@"
