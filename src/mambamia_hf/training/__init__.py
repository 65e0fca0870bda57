"""Training on conversations about images and videos with the stock `Trainer`: `python -m mambamia_hf.training`.

records.py      conversations in LLaVA's format
mixtures.py     several data sets in a YAML file, as in LLaVA-NeXT
data.py         whatever `--data` names
media.py        their images and videos, as pixels or as precomputed features
collator.py     records to batches
evaluation.py   what is measured on an evaluation set
features.py     the command that precomputes features: `python -m mambamia_hf.training.features`
stages.py       which parts of the model learn in which stage
arguments.py    the command line and its YAML file
checkpoints.py  where an interrupted run goes on
logs.py         what is logged beside the loss
run_card.py     the model card of a run
trainer.py      the `Trainer` of the command
__main__.py     the training command
"""

from .collator import ConversationCollator
from .data import open_dataset
from .evaluation import AnswerMetrics, EvaluationSet, answer_statistics
from .media import MediaReader, VisionFeatures
from .mixtures import Mixture, load_mixture
from .records import load_records, parse_record


__all__ = [
    "AnswerMetrics",
    "ConversationCollator",
    "EvaluationSet",
    "MediaReader",
    "Mixture",
    "VisionFeatures",
    "answer_statistics",
    "load_mixture",
    "load_records",
    "open_dataset",
    "parse_record",
]
