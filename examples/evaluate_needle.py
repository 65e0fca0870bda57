"""Asks a checkpoint about fresh needle videos and writes how often it is right.

    python examples/evaluate_needle.py --output examples/results/needle.json

The videos are H.264 files made for the purpose from seeds that training never draws. One question is asked of each.
"""

import argparse
import json
import random
import tempfile
from collections import defaultdict
from pathlib import Path

import torch
from tqdm import tqdm

from mambamia_hf import BUNDLED_CHECKPOINT, MambaMiaForConditionalGeneration, MambaMiaProcessor
from mambamia_hf.needle import questions, write_needle_video


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", default=BUNDLED_CHECKPOINT, help="folder or Hub id; the bundled checkpoint if absent"
    )
    parser.add_argument("--num_videos", type=int, default=200)
    parser.add_argument("--num_frames", type=int, default=64, help="frames of a video")
    parser.add_argument("--first_seed", type=int, default=500_000, help="training uses 1,000,000 and above")
    parser.add_argument("--keep_ratios", type=float, nargs="+", default=[1.0, 0.5, 0.25], help="shares of frames kept")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    arguments = parser.parse_args()

    processor = MambaMiaProcessor.from_pretrained(arguments.model)
    model = MambaMiaForConditionalGeneration.from_pretrained(arguments.model, dtype=torch.float32).eval()
    right = {ratio: defaultdict(list) for ratio in arguments.keep_ratios}
    with tempfile.TemporaryDirectory() as folder:
        for seed in tqdm(range(arguments.first_seed, arguments.first_seed + arguments.num_videos)):
            video = write_needle_video(Path(folder) / "video.mp4", seed, duration=arguments.num_frames / 2)
            question, answer = random.Random(seed).choice(questions(video))
            kind = video.needles[0].kind if answer == video.needles[0].value else "colour"
            content = [{"type": "video", "path": str(video.path)}, {"type": "text", "text": question}]
            for ratio in arguments.keep_ratios:
                inputs = processor.apply_chat_template(
                    [{"role": "user", "content": content}],
                    add_generation_prompt=True,
                    tokenize=True,
                    return_dict=True,
                    return_tensors="pt",
                    processor_kwargs={"keep_ratio": ratio},
                )
                output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
                given = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]
                right[ratio][kind].append(given == answer)
    results = {
        "num_videos": arguments.num_videos,
        "num_frames": arguments.num_frames,
        "accuracy": {
            str(ratio): {
                "all": sum(map(sum, kinds.values())) / arguments.num_videos,
                **{kind: sum(answers) / len(answers) for kind, answers in sorted(kinds.items())},
            }
            for ratio, kinds in right.items()
        },
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
