"""The command line of the converter."""

import argparse

from huggingface_hub import HfApi

from ..messages import printable
from .checkpoints import convert_from_original, convert_to_original


def main(arguments: list[str] | None = None) -> None:
    """Converts a checkpoint and, where asked to, uploads it; a fault of the input ends in one line and status 2.

    Args:
        arguments: command-line arguments, by default those of the process.
    """
    parser = argparse.ArgumentParser(
        prog="python -m mambamia_hf.convert",
        description="Convert a checkpoint of MambaMia in LLaVA's layout to Transformers, or back.",
    )
    parser.add_argument("src", metavar="SRC", help="folder or Hub name of the checkpoint")
    parser.add_argument("dst", metavar="DST", help="folder to write, new or empty")
    parser.add_argument("--reverse", action="store_true", help="convert from Transformers to LLaVA's layout")
    parser.add_argument("--push-to-hub", metavar="ID", help="also upload DST to this repository of the Hub")
    parser.add_argument(
        "--ignore",
        metavar="PATTERN",
        nargs="+",
        action="extend",
        default=[],
        help="leave out tensors with such names, as in 'model.audio_tower.*'",
    )
    parser.add_argument(
        "--new-compressor",
        action="store_true",
        help="put a new compressor, to be trained, in the place of an image model's MLP (mlp2x_gelu)",
    )
    args = parser.parse_args(arguments)
    if args.reverse and (args.ignore or args.new_compressor):
        option = "--ignore" if args.ignore else "--new-compressor"
        parser.error(f"{option} applies to checkpoints in LLaVA's layout; leave it out with --reverse.")
    try:
        if args.reverse:
            written = convert_to_original(args.src, args.dst)
        else:
            written = convert_from_original(args.src, args.dst, ignore=args.ignore, new_compressor=args.new_compressor)
        print(f"Wrote {written}.")
        if args.push_to_hub:
            api = HfApi()
            repo_id = api.create_repo(args.push_to_hub, exist_ok=True).repo_id
            print(f"Uploaded {api.upload_folder(repo_id=repo_id, folder_path=args.dst)}.")
    except (OSError, ValueError) as error:
        line = " ".join(str(error).split())
        parser.exit(2, printable(line) + "\n")
