#!/usr/bin/env bash
# The whole pipeline on the embedded demo, on any machine:
#
#   bash launch/local.sh            everything in ./work
#   WORK=/tmp/demo bash launch/local.sh
#
# Render videos, extract features, train with and without MemAug, evaluate,
# report. Every stage reuses what an earlier run finished.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
environment

work=${WORK:-work}
config=configs/demo.py:data=$work/data,stage=
export TF_CPP_MIN_LOG_LEVEL=${TF_CPP_MIN_LOG_LEVEL:-2}
# The demo is for this machine's CPU or GPU; on a TPU VM set JAX_PLATFORMS=tpu.
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}

step() { echo; echo "== $1"; shift; "$@"; }

# train NAME [options]: both stages in $work/NAME.
train() {
  local run=$work/$1
  shift
  python -m hourjax.train --config="${config}1" --workdir="$run/stage1" "$@"
  python -m hourjax.train --config="${config}2" --workdir="$run/stage2" \
    --config.init="$run/stage1" "$@"
}

step "1/5 render videos and write questions" \
  python -m hourjax.demo --workdir="$work"
step "2/5 extract features" \
  python -m hourjax.extract --config="${config}1" \
  --videos="$work/data/videos" --out="$work/data/features"
step "3/5 train" train memaug
step "4/5 train the same without MemAug, to compare" \
  train no_memaug --config.model.memaug_layers=0
step "5/5 evaluate on held-out videos of up to one hour" \
  python -m hourjax.evaluate --records="$work/data/test.json" \
  --run="$work/memaug/stage2" --without="$work/no_memaug/stage2" --out="$work"
echo
echo "in $work: report.json, loss.png, accuracy_by_task.png," \
  "accuracy_by_duration.png, needles_by_duration.png"
