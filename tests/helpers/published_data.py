"""Data sets in the layouts in which they are published, their archives unpacked, with small videos and pictures."""

import json
from pathlib import Path

from conversations import record
from PIL import Image
from video_files import draw_number, write_video


LENGTHS = ("0_30_s", "30_60_s", "1_2_m", "2_3_m")
VISTA = (
    "event_relationship_mcq",
    "event_relationship_qa",
    "hr_video_grid_mcq",
    "hr_video_grid_qa",
    "long_video_caption",
    "spatial_niah_mcq",
    "spatial_niah_qa",
    "spatiotemporal_niah_mcq",
    "spatiotemporal_niah_qa",
    "temporal_niah_mcq",
    "temporal_niah_qa",
    "two_needle_niah_qa",
)
OPTIONS = "\nOptions:\nA. one.\nB. two.\nPlease respond with only the letter of the correct answer."


def write_llava_pretrain(folder: Path, num_images: int = 4) -> Path:
    """`blip_laion_cc_sbu_558k.json` and the unpacked images.zip; the picture comes before or after the text."""
    records = []
    for number in range(num_images):
        name = f"0045{number % 2}/00453937{number}"
        file = folder / "images" / f"{name}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw_number(number)).save(file)
        prompt = ("Render a clear and concise summary of the photo.\n<image>", "<image>\nWhat is this?")[number % 2]
        records.append(record(name[6:], prompt, f"a {number}", image=f"{name}.jpg"))
    (folder / "blip_laion_cc_sbu_558k.json").write_text(json.dumps(records, indent=2))
    return folder


def write_llava_video(folder: Path, lengths: tuple[str, ...] = LENGTHS) -> Path:
    """Captions, questions with open and with given answers about one video each, and the README's configurations."""
    configs = []
    for length in lengths:
        for source, place in (("academic", "academic_source/Charades"), ("youtube", "liwei_youtube_videos/videos")):
            subset = f"{length}_{source}_v0_1"
            video = f"{place}/{source[:2].upper()}587.mp4"
            (folder / subset / video).parent.mkdir(parents=True, exist_ok=True)
            write_video(folder / subset / video, num_frames=12 + len(length), fps=4)
            tasks = {
                f"{length}_{source}_v0_1_cap": [
                    "<image>\nPlease describe the video in detail.",
                    "The video has dots.",
                ],
                f"{length}_{source}_oe_v0_1_qa": ["<image>\nWhat is it?", "Dots.", "Which colour?", "White."],
                f"{length}_{source}_mc_v0_1_qa": [f"<image>\nHow many?{OPTIONS}", "B."],
            }
            for name, texts in tasks.items():
                one = {**record(video[-9:-4], *texts), "data_source": subset, "video": video}
                (folder / subset / f"{name}_processed.json").write_text(json.dumps([one, one], indent=4))
            splits = {"caption": "cap", "open_ended": "oe", "multi_choice": "mc"}
            files = [f"  - split: {split}\n    path: {subset}/*{part}*.json" for split, part in splits.items()]
            configs.append("\n".join([f"- config_name: {subset}\n  data_files:", *files]))
    card = ["---", "configs:", *configs, "tags:", "- video", "---", "# Dataset Card for LLaVA-Video-178K", ""]
    (folder / "README.md").write_text("\n".join(card))
    return folder


def write_vista(folder: Path) -> Path:
    """A JSON file and a folder of videos per subset; its videos are in `image`, and no text has a placeholder."""
    for number, subset in enumerate(VISTA):
        (folder / subset).mkdir(parents=True)
        write_video(folder / subset / f"CPLa78IpO9{number}_19_17to138.mp4", num_frames=10 + number, fps=4)
        one = record(f"{subset}_0", f"When is it?{OPTIONS}", "A", image=f"CPLa78IpO9{number}_19_17to138.mp4")
        name = subset.replace("spatiotemporal_niah_qa", "spatialtemporal_niah_qa")  # as it is published
        (folder / f"{name}.json").write_text(json.dumps([one]))
    return folder
