#!/usr/bin/env bash
# The whole pipeline on the embedded demo, on any machine:
#
#   bash launch/local.sh            everything in ./work
#   bash launch/local.sh --compare  and the same without MemAug, and needles in
#                                   videos of up to 8 hours
#   WORK=/tmp/demo SEED=1 bash launch/local.sh      another folder, another world
#   SIZE=full JAX_PLATFORMS=tpu bash launch/local.sh  a larger model and five times
#                                   the videos, for a GPU or a TPU chip
#
# Render videos, align the tower with words, extract features, train, evaluate,
# report. Every stage reuses what an earlier run finished.
set -euo pipefail
cd "$(dirname "$0")/.."
# Nothing, or --compare.
compare=${1:-}
if [[ $compare && $compare != --compare ]]; then
  echo "unknown option $compare; the only one is --compare" >&2
  exit 2
fi

source launch/environment.sh
# shellcheck disable=SC2119  # no extras
environment

work=${WORK:-work} seed=${SEED:-0} size=${SIZE:-small}
config=configs/demo.py:data=$work/data,size=$size,stage=
videos=()
if [[ $size == full ]]; then videos=(--train_videos=5400); fi
export TF_CPP_MIN_LOG_LEVEL=${TF_CPP_MIN_LOG_LEVEL:-2}
# The demo is for this machine's CPU or GPU; on a TPU VM set JAX_PLATFORMS=tpu.
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
# The C library hands large arrays back to the system after every step; keeping
# them makes a step of the demo a quarter faster.
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 MALLOC_ARENA_MAX=1

step() { echo; echo "== $1"; shift; "$@"; }

# The conversations of each stage, with the durations of the stored features.
prepare() {
  local stage=1 records
  for records in lookups train memory; do
    python -m hourjax.prepare --out="$work/data/stage$stage" --overwrite \
      --records="$work/data/$records.json" --tokenizer="$work/data/tokenizer" \
      --features="$work/data/features"
    stage=$((stage + 1))
  done
}

# train STAGE FOLDER INIT [options]
train() {
  local stage=$1 folder=$2 init=$3
  shift 3
  python -m hourjax.train --config="$config$stage" --workdir="$work/$folder" \
    --config.init="$work/$init" --config.seed="$seed" "$@"
}

evaluation=(--model="$work/memaug" --benchmark=records --data="$work/data"
  --features="$work/data/features" --out="$work")

step "1/8 render videos and write questions" \
  python -m hourjax.demo --workdir="$work" --seed="$seed" \
  ${videos[@]+"${videos[@]}"}
step "2/8 stage 0: bring the tower and the words together" \
  python -m hourjax.align --config="${config}0" --config.seed="$seed" \
  --captions="$work/data/captions.json" --workdir="$work/stage0"
step "3/8 extract features" \
  python -m hourjax.extract --config="${config}0" --tower="$work/stage0" \
  --videos="$work/data/videos" --out="$work/data/features"
step "4/8 prepare the questions" prepare
step "5/8 stage 1: look-ups in the kept frames" train 1 stage1 stage0
step "6/8 stage 2: all tasks" train 2 stage2 stage1
step "7/8 stage 3: with MemAug and the whole memory" train 3 memaug stage2
if [[ $compare ]]; then
  step "stage 3 again without MemAug, to compare" \
    train 3 no_memaug stage2 --config.model.memaug_layers=0
  evaluation+=(--compare="$work/no_memaug" --names="with MemAug,without MemAug")
fi
step "8/8 evaluate on held-out videos of up to one hour" \
  python -m hourjax.evaluate "${evaluation[@]}"
if [[ $compare ]]; then
  step "needles at all depths of videos of up to 8 hours" \
    python -m hourjax.haystack --config="${config}0" --tower="$work/stage0" \
    --out="$work/haystack" --seed="$seed"
  python -m hourjax.evaluate --model="$work/memaug" --benchmark=records \
    --data="$work/haystack" --features="$work/haystack/features" \
    --out="$work/haystack"
fi
echo
echo "in $work: report.md, report.json, loss.png, accuracy_by_task.png," \
  "accuracy_by_duration.png, needles_by_duration.png, needles_by_depth.png," \
  "answers-00000.jsonl"
