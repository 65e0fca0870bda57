"""Which parts of the model learn in which stage of training."""

from collections.abc import Sequence
from dataclasses import dataclass

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from ..modeling_mambamia import MambaMiaForConditionalGeneration
from ..processing_mambamia import MambaMiaProcessor
from ..tokenization_mambamia import SPECIAL_TOKENS


@dataclass(frozen=True)
class Stage:
    """The parts that learn, and how fast they do unless `learning_rate` says otherwise."""

    learns: tuple[str, ...]
    learning_rate: float


# The vision tower never learns. Images have no time, so the temporal layers would learn a meaningless Δ from them.
STAGES = {
    "image": Stage(("compressor", "language_model"), 2e-5),
    "align": Stage(("compressor", "temporal_layers"), 1e-4),
    "video": Stage(("compressor", "temporal_layers", "language_model"), 2e-5),
}

# How the names of the weights of each part begin; a weight belongs to the first part that fits.
PARTS = {
    "vision_tower": ("model.vision_tower.",),
    "temporal_layers": ("model.compressor.temporal_layers.",),
    "compressor": ("model.compressor.", "model.end_of_frame"),
    "language_model": ("model.language_model.", "lm_head."),
}


def part_of(name: str) -> str:
    """The part that the weight of this name belongs to."""
    return next(part for part, beginnings in PARTS.items() if name.startswith(beginnings))


def marks_of_turns(processor: MambaMiaProcessor) -> list[int]:
    """The tokens between which a chat's turns stand; a language model that lacked them has random numbers for them."""
    vocabulary = processor.tokenizer.get_vocab()
    placeholders = (processor.image_token, processor.video_token)  # media take their places
    return [vocabulary[token] for token in SPECIAL_TOKENS if token in vocabulary and token not in placeholders]


def prepare_model(
    model: MambaMiaForConditionalGeneration, stage: str, lora_rank: int = 0, learned_tokens: Sequence[int] = ()
) -> MambaMiaForConditionalGeneration | PeftModel:
    """Freezes what does not learn in a stage.

    Args:
        model: the model to train, changed in place.
        stage: a key of `STAGES`.
        lora_rank: rank of the LoRA adapter that the language model learns by; 0 trains it in full.
        learned_tokens: tokens whose embeddings, and scores, learn in full beside an adapter, see [`marks_of_turns`].

    Returns:
        The model, or with `lora_rank` the model with an adapter.
    """
    learns = STAGES[stage].learns
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) in learns)
    if not lora_rank:
        return model
    layers = {
        name.rpartition(".")[2]
        for name, module in model.model.language_model.named_modules()
        if isinstance(module, nn.Linear)
    }
    embeddings = {name for name, module in model.named_modules() if module is model.get_input_embeddings()}
    if not model.config.tie_word_embeddings:
        embeddings.add("lm_head")
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora_rank,
        lora_alpha=2 * lora_rank,
        lora_dropout=0.05,
        target_modules=rf"model\.language_model\..*\.({'|'.join(sorted(layers))})",
        trainable_token_indices={name: list(learned_tokens) for name in embeddings} if learned_tokens else None,
        modules_to_save=["compressor"],  # learns in full; an `end_of_frame` vector stays as it is
    )
    adapted = get_peft_model(model, lora)
    adapted.model.model.compressor.float()  # bfloat16, which may do for the rest, would lose small steps
    if "temporal_layers" not in learns:
        adapted.model.model.compressor.modules_to_save.default.temporal_layers.requires_grad_(False)
    return adapted


__all__ = ["PARTS", "STAGES", "Stage", "marks_of_turns", "part_of", "prepare_model"]
