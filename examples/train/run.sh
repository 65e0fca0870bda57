#!/usr/bin/env bash
# Trains a model in three stages, each from the model of the stage before it:
#
#     examples/train/run.sh START DATA OUTPUT [ARGUMENT...]
#
# START is the folder of a model to start from (docs/training.md says how to make one). DATA holds image.json,
# align.json and video.json in LLaVA's format, and their media in the folder media. Where it also holds image_eval.json,
# align_eval.json or video_eval.json, the stage is evaluated on that at its end. More arguments are those of every
# stage; stage.sh says how several processes train. After an interruption, the same command goes on.
set -euo pipefail
start=$1 data=$2 output=$3
here=$(dirname "$0")

model=$start
for stage in image align video; do
    evaluation=()
    if [ -f "$data/${stage}_eval.json" ]; then
        evaluation=(--eval_data "$data/${stage}_eval.json")
    fi
    "$here/stage.sh" "$stage" "$output/$stage" \
        --model "$model" \
        --data "$data/$stage.json" \
        --media_folder "$data/media" \
        ${evaluation[@]+"${evaluation[@]}"} \
        "${@:4}"
    model=$output/$stage
done
