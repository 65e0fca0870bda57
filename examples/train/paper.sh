#!/usr/bin/env bash
# Trains in the paper's order: an image model comes first, before there is a compressor; then the compressor alone
# learns on images, then compressor and language model on videos.
#
#     examples/train/paper.sh IMAGE_MODEL DATA OUTPUT [ARGUMENT...]
#
# IMAGE_MODEL is an image model with an MLP in LLaVA's layout, which LLaVA's own code trains (docs/conversion.md). DATA
# holds the data sets as they are published, LLaVA-Pretrain, LLaVA-Video-178K and VISTA-400K (docs/training.md has the
# commands). paper/align.yaml and paper/video.yaml say what of them is used; they are copied there, to be changed. More
# arguments are those of both stages; stage.sh says how several processes train. After an interruption, the same
# command goes on.
set -euo pipefail
image_model=$1 data=$2 output=$3
here=$(dirname "$0")

for stage in align video; do
    [ -f "$data/$stage.yaml" ] || cp "$here/paper/$stage.yaml" "$data"
done
mkdir -p "$output"
[ -d "$output/start" ] || python -m mambamia_hf.convert "$image_model" "$output/start" --new-compressor
"$here/stage.sh" align "$output/align" --model "$output/start" --data "$data/align.yaml" \
    --per_device_train_batch_size 16 --gradient_accumulation_steps 2 "${@:4}"
"$here/stage.sh" video "$output/video" --model "$output/align" --data "$data/video.yaml" "${@:4}"
