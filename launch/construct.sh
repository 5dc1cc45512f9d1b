#!/usr/bin/env bash
# Constructs questions about a folder of videos on one machine with a GPU:
#
#   bash launch/construct.sh videos marathon [options of hourjax.construct]
#
# starts a vLLM server with a vision-language model, which captions, writes and
# judges, waits until it answers, constructs, and stops the server. What was
# answered is kept in the second folder; the same line goes on after a stop.
#
#   MODEL=Qwen/Qwen2.5-VL-7B-Instruct  the model, a name of the Hugging Face hub
#                                      or a folder; the server downloads it
#   GPUS=1                             GPUs that the model is split over
#   PORT=8000                          of the server
#   MAX_LEN=32768                      tokens of a prompt and its answer
#   WRITER=NAME@URL                    another model for everything but captions
#   VLLM=vllm                          the command; by default it is installed
#                                      into .venv-vllm, apart from hourjax, since
#                                      it pins other versions of the same packages
#
# A 7B model wants a GPU of 24 GiB or more.
set -euo pipefail
if (($# < 2)); then
  echo "usage: bash launch/construct.sh VIDEOS OUT [options]" >&2
  exit 2
fi
videos=$(realpath "$1") out=$(realpath -m "$2")
shift 2
cd "$(dirname "$0")/.."
model=${MODEL:-Qwen/Qwen2.5-VL-7B-Instruct} port=${PORT:-8000}
url=http://127.0.0.1:$port/v1
vllm_version=0.33.0

source launch/environment.sh
environment construct

vllm=${VLLM:-}
if [[ ! $vllm ]]; then
  vllm=.venv-vllm/bin/vllm
  if [[ ! -x $vllm ]]; then
    echo "installing vLLM $vllm_version into .venv-vllm (some minutes, once)"
    "$(find_python)" -m venv .venv-vllm
    .venv-vllm/bin/python -m pip install --quiet \
      --disable-pip-version-check "vllm==$vllm_version"
  fi
fi

mkdir -p "$out"
log=$out/server.log
# Prefix caching, since the questions and checks of a topic share their text.
"$vllm" serve "$model" --served-model-name captioner --host 127.0.0.1 \
  --port "$port" --tensor-parallel-size "${GPUS:-1}" \
  --max-model-len "${MAX_LEN:-32768}" --enable-prefix-caching \
  --limit-mm-per-prompt '{"image": 64, "video": 1}' >"$log" 2>&1 &
server=$!
trap 'kill "$server" 2>/dev/null; wait "$server" 2>/dev/null || true' EXIT

echo "starting the server of $model (its log is $log)"
began=$SECONDS
until .venv/bin/python - "$url/models" 2>/dev/null <<'END'
import sys
import urllib.request

urllib.request.urlopen(sys.argv[1], timeout=5)
END
do
  if ! kill -0 "$server" 2>/dev/null; then
    echo "error: the server has ended; the last lines of $log:" >&2
    tail -n 20 "$log" >&2
    exit 1
  fi
  sleep 2
  if (((SECONDS - began) % 30 < 2)); then
    echo "waiting for the server ($((SECONDS - began)) s so far)"
  fi
done

python -m hourjax.construct --videos="$videos" --out="$out" \
  --captioner="captioner@$url" --writer="${WRITER:-captioner@$url}" "$@"
