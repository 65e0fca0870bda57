#!/usr/bin/env bash
# Trains a model in three stages, each from the model of the stage before it:
#
#     examples/train/run.sh START DATA OUTPUT [ACCELERATE_CONFIG]
#
# START is the folder of a model to start from (docs/training.md says how to make one). DATA holds image.json,
# align.json and video.json in LLaVA's format, and their media in the folder media. With a configuration of accelerate,
# such as examples/train/fsdp2.yaml, several processes train. Run it again to go on after an interruption.
set -euo pipefail
start=$1 data=$2 output=$3
configs=$(dirname "$0")
if [ $# -gt 3 ]; then
    launch=(accelerate launch --config_file "$4" -m)
else
    launch=(python -m)
fi

model=$start
for stage in image align video; do
    if [ ! -f "$output/$stage/trainer_state.json" ]; then  # written when the stage has ended
        "${launch[@]}" mambamia_hf.training "$configs/$stage.yaml" \
            --model "$model" \
            --data "$data/$stage.json" \
            --media_folder "$data/media" \
            --output_dir "$output/$stage" \
            --resume_from_checkpoint true
    fi
    model=$output/$stage
done
