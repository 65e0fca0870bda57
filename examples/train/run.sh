#!/usr/bin/env bash
# Trains a model in three stages, each from the model of the stage before it:
#
#     examples/train/run.sh START DATA OUTPUT [ARGUMENT...]
#
# START is the folder of a model to start from (docs/training.md says how to make one). DATA holds image.json,
# align.json and video.json in LLaVA's format, and their media in the folder media. More arguments are those of every
# stage. Several processes train if ACCELERATE_CONFIG names a configuration, such as examples/train/fsdp2.yaml.
# After an interruption, the same command goes on.
set -euo pipefail
start=$1 data=$2 output=$3
configs=$(dirname "$0")
launch=(python -m)
if [ -n "${ACCELERATE_CONFIG:-}" ]; then
    launch=(accelerate launch --config_file "$ACCELERATE_CONFIG" -m)
fi

model=$start
for stage in image align video; do
    if [ ! -f "$output/$stage/trainer_state.json" ]; then  # a stage writes it at its end
        "${launch[@]}" mambamia_hf.training "$configs/$stage.yaml" \
            --model "$model" \
            --data "$data/$stage.json" \
            --media_folder "$data/media" \
            --output_dir "$output/$stage" \
            --resume_from_checkpoint true \
            "${@:4}"
    fi
    model=$output/$stage
done
