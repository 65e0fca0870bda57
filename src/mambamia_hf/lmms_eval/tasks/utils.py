"""Needle videos as lmms-eval asks about them."""

from typing import Any


def doc_to_visual(doc: dict[str, Any]) -> list[str]:
    return [f"needles/{doc['video']}"]


def doc_to_text(doc: dict[str, Any], lmms_eval_specific_kwargs: Any = None) -> str:
    return doc["conversations"][0]["value"].removeprefix("<video>\n")


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """1 for a right answer and 0 for another, for all tasks and for that of the video."""
    right = float(results[0] in doc["answers"])
    return {"accuracy": right, doc["task"]: right}
