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
# shellcheck disable=SC2119  # no extras
environment

work=${WORK:-work}
config=configs/demo.py:data=$work/data,stage=
export TF_CPP_MIN_LOG_LEVEL=${TF_CPP_MIN_LOG_LEVEL:-2}
# The demo is for this machine's CPU or GPU; on a TPU VM set JAX_PLATFORMS=tpu.
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}

step() { echo; echo "== $1"; shift; "$@"; }

# The conversations of both stages, with the durations of the stored features.
prepare() {
  local stage records
  for stage in 1 2; do
    records=train.json
    [[ $stage == 1 ]] && records=train_stage1.json
    python -m hourjax.prepare --out="$work/data/stage$stage" --overwrite \
      --records="$work/data/$records" --tokenizer="$work/data/tokenizer" \
      --features="$work/data/features"
  done
}

# train NAME [options]: both stages in $work/NAME.
train() {
  local run=$work/$1
  shift
  python -m hourjax.train --config="${config}1" --workdir="$run/stage1" "$@"
  python -m hourjax.train --config="${config}2" --workdir="$run/stage2" \
    --config.init="$run/stage1" "$@"
}

step "1/6 render videos and write questions" \
  python -m hourjax.demo --workdir="$work"
step "2/6 extract features" \
  python -m hourjax.extract --config="${config}1" \
  --videos="$work/data/videos" --out="$work/data/features"
step "3/6 prepare the questions" prepare
step "4/6 train" train memaug
step "5/6 train the same without MemAug, to compare" \
  train no_memaug --config.model.memaug_layers=0
step "6/6 evaluate on held-out videos of up to one hour" \
  python -m hourjax.evaluate --model="$work/memaug/stage2" \
  --compare="$work/no_memaug/stage2" --names="with MemAug,without MemAug" \
  --benchmark=records --data="$work/data" --features="$work/data/features" \
  --out="$work"
echo
echo "in $work: report.md, report.json, loss.png, accuracy_by_task.png," \
  "accuracy_by_duration.png, needles_by_duration.png, answers-00000.jsonl"
