"""Training on conversations about images and videos with the stock `Trainer`: `python -m mambamia_hf.training`.

records.py      conversations in LLaVA's format
media.py        their images and videos, as pixels or as precomputed features
collator.py     records to batches
features.py     the command that precomputes features: `python -m mambamia_hf.training.features`
stages.py       which parts of the model learn in which stage
arguments.py    the command line and its YAML file
checkpoints.py  where an interrupted run goes on
logs.py         what is logged beside the loss
__main__.py     the training command
"""

from .collator import ConversationCollator
from .media import MediaReader, VisionFeatures
from .records import load_records, open_dataset, parse_record


__all__ = ["ConversationCollator", "MediaReader", "VisionFeatures", "load_records", "open_dataset", "parse_record"]
