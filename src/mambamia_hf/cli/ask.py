"""`mambamia ask`: questions about a video."""

import json
import sys
from argparse import Namespace
from dataclasses import asdict
from typing import TYPE_CHECKING

from ..messages import without_secrets
from .console import say
from .opening import check_plot_path, describe_evidence, name_bundled_model, open_video


if TYPE_CHECKING:
    from ..inference import Answer


def run(arguments: Namespace) -> None:
    """Answer the questions, each as soon as it can be; then draw the picture."""
    if arguments.plot is not None:
        check_plot_path(arguments.plot)
    with open_video(arguments) as encoded:
        if arguments.plot is not None and encoded.frame_deltas is None:
            raise ValueError("the checkpoint has no temporal layer and so no Δ to plot; leave out --plot.")
        answers = []
        for question in arguments.questions:
            answer = encoded.ask(question, evidence=arguments.evidence)
            answers.append((question, answer.answer))
            if arguments.json:
                print(to_json(answer, arguments.video), flush=True)
            else:
                evidence = "" if answer.evidence is None else f"\n{describe_evidence(answer.evidence)}"
                is_one = len(arguments.questions) == 1
                print(answer.answer + evidence if is_one else f"{question}\n{answer.answer}{evidence}\n", flush=True)
        name_bundled_model(arguments)
        if arguments.plot is not None:
            from .timeline import draw_timeline

            draw_timeline(arguments.plot, encoded, answers)
            say(f"wrote {arguments.plot}")


def to_json(answer: "Answer", video: str) -> str:
    """One line with everything in an answer about `video`; in ASCII where stdout cannot print all characters."""
    is_unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    fields = {**asdict(answer), "video": without_secrets(video)}
    if answer.evidence is None:
        del fields["evidence"]
    return json.dumps(fields, ensure_ascii=not is_unicode)
