#!/usr/bin/env bash
# Trains the bundled model from nothing on the needle benchmark: what appears, in which order, how
# often and when, or that nothing does.
#
#     examples/needle/run.sh runs/needle
#
# The model is $OUT/times at the end. Run again, it continues where it was stopped.
set -euo pipefail
OUT="${1:?usage: $0 OUTPUT_FOLDER}"
export PYTHONPATH="$(cd "$(dirname "$0")/.." && pwd)${PYTHONPATH:+:$PYTHONPATH}"

# How everything is trained.
TRAINING=(
    --lr_scheduler_type cosine --weight_decay 0.05 --adam_beta2 0.98 --seed 2025 --report_to none
    --logging_steps 25 --save_steps 250 --save_total_limit 1 --dataloader_num_workers 1 --resume_from_checkpoint true
)
# A training command writes `trainer_state.json` last.
finished() { [ -f "$OUT/$1/trainer_state.json" ]; }

# Data.
python -m needle.training_data stills --output "$OUT/data/stills" --count 8000
python -m needle.training_data clips --output "$OUT/data/clips" --count 3000
python -m needle.training_data videos --output "$OUT/data/videos" --count 4500
python -m needle.training_data long_videos --output "$OUT/data/long_videos" --count 700

# As nothing is downloaded, the vision tower has to learn, too. From here on it is frozen. Frames take as long to make
# as to learn from, so two processes make them.
finished vision || python -m needle.pretrain_vision --output_dir "$OUT/vision" \
    --max_steps 4000 --per_device_train_batch_size 8 --learning_rate 2e-3 --warmup_steps 0.1 "${TRAINING[@]}" \
    --dataloader_num_workers 2

# features KIND FRAMES: its features of all stills, clips or videos, in folders of their own, for clips have the names of
# videos.
features() {
    python -m mambamia_hf.training.features --model "$OUT/vision" --data "$OUT/data/$1/records/train.jsonl" \
        --media_folder "$OUT/data/$1" --output "$OUT/features/$1" --num_frames "$2"
}
for KIND in stills clips videos; do features "$KIND" 128; done
features long_videos 384

# train NAME MODEL KIND ARGUMENTS...: trains $OUT/NAME from $OUT/MODEL on stills, clips or videos.
train() {
    finished "$1" || python -m mambamia_hf.training --model "$OUT/$2" --output_dir "$OUT/$1" \
        --data "$OUT/data/$3/records" --features "$OUT/features/$3" --num_frames 128 --warmup_steps 0.05 \
        "${TRAINING[@]}" "${@:4}"
}
TWELVE_VIDEOS=(--stage video --per_device_train_batch_size 12 --train_sampling_strategy group_by_length)

# Compressor and language model learn what is in stills; in clips, which time belongs to which frame; and in videos to
# count and to order. No frame is dropped until then, for what it showed is asked for. In the last stage frames are
# dropped, so that Δ is large where a symbol appears, and videos seem up to twelve times longer than they are.
train image vision stills --stage image --per_device_train_batch_size 48 --max_steps 300 --learning_rate 1e-3
train clips image clips --stage video --per_device_train_batch_size 24 --max_steps 500 --learning_rate 2e-3 \
    --frame_dropout 0
train video clips videos "${TWELVE_VIDEOS[@]}" --max_steps 2500 --learning_rate 1.5e-3 --frame_dropout 0
train long_video video videos "${TWELVE_VIDEOS[@]}" --max_steps 500 --learning_rate 5e-4 --frame_dropout 0.8 \
    --length_scale 12

# At last compressor and language model learn to read whole hours, most of them put together from frames of others, and
# not to forget stills.
python -m torch.distributed.run --nproc_per_node 2 -m needle.train_times --model "$OUT/long_video" \
    --features "$OUT/features/long_videos" --output "$OUT/times" --max_steps 5500
