#!/usr/bin/env bash
# Trains and compares all compressors: 24 runs of some five to fifteen minutes on one core each.
#
#     examples/needle/run.sh runs/needle
#     examples/ablation/run.sh runs/needle runs/ablation
#
# Of the first command, all steps after the features are not needed. Run again, it continues where it was stopped.
set -euo pipefail
NEEDLE="${1:?usage: $0 NEEDLE_FOLDER OUTPUT_FOLDER}"
OUT="${2:?usage: $0 NEEDLE_FOLDER OUTPUT_FOLDER}"
export PYTHONPATH="$(cd "$(dirname "$0")/.." && pwd)${PYTHONPATH:+:$PYTHONPATH}"

# Test videos as long as the longest of training, and four times longer, with their features.
for FRAMES in 32 128; do
    TEST="$OUT/test-$FRAMES"
    python -m needle.training_data test_videos --output "$TEST" --count 300 --num_frames "$FRAMES" \
        --tasks retrieval ordering counting
    python -m mambamia_hf.training.features --model "$NEEDLE/vision" --data "$TEST/records/train.jsonl" \
        --media_folder "$TEST" --output "$TEST/features" --num_frames 128
done

python -m ablation.run --needle "$NEEDLE" --tests "$OUT/test-32" "$OUT/test-128" --output "$OUT/ablation.jsonl" \
    --train_frames 32 --image_steps 100 --video_steps 1200

# The tables and plots go beside the results.
python -m ablation.report "$OUT/ablation.jsonl"
