#!/usr/bin/env bash
# Trains one stage, unless it has ended; after an interruption, the same command goes on:
#
#     examples/train/stage.sh STAGE OUTPUT [ARGUMENT...]
#
# STAGE is image, align or video, OUTPUT the folder of its model. Several processes train if ACCELERATE_CONFIG names a
# configuration, such as examples/train/fsdp2.yaml.
set -euo pipefail
stage=$1 output=$2
launch=(python -m)
if [ -n "${ACCELERATE_CONFIG:-}" ]; then
    launch=(accelerate launch --config_file "$ACCELERATE_CONFIG" -m)
fi

if [ ! -f "$output/trainer_state.json" ]; then  # a stage writes it at its end
    "${launch[@]}" mambamia_hf.training "$(dirname "$0")/$stage.yaml" \
        --output_dir "$output" \
        --resume_from_checkpoint true \
        "${@:3}"
fi
