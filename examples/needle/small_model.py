"""The small model of the needle benchmark before it has learned anything: tokenizer, processor and weights."""

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Qwen2Model, Qwen2Tokenizer, SiglipImageProcessor

from mambamia_hf import MambaMiaConfig, MambaMiaForConditionalGeneration, MambaMiaProcessor, MambaMiaVideoProcessor
from mambamia_hf.frame_times import time_token_ids
from mambamia_hf.tokenization_mambamia import SPECIAL_TOKENS

from .glyphs import COLOURS, DIGITS, SHAPES
from .questions import CHOICE_QUESTIONS, NOTHING, OPEN_QUESTIONS


IMAGE_SIZE = 96
TIME_FORMAT = "mm:ss"
DIGIT_DISTANCES = (1, 2, 4, 5)  # from the anchor of a frame back to the digits of its time, one per attention head
SHARPNESS = 6.0  # of a head that looks back: about 90 % of its attention is where it looks
SHARP_FREQUENCIES = 4  # the fastest ones of the rotary embedding; slower ones do not tell neighbours apart


def build_tokenizer() -> Qwen2Tokenizer:
    """A byte-level BPE tokenizer with Qwen2's special tokens and a vocabulary of the few words of the benchmark."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    texts = [
        wording.format(medium=medium, kind=kind, value=value)
        for wordings in [*OPEN_QUESTIONS.values(), *CHOICE_QUESTIONS.values()]
        for wording in wordings
        for medium in ("video", "image")
        for kind in ("shape", "digit")
        for value in SHAPES
    ]
    texts += [*SHAPES, *DIGITS, *COLOURS, NOTHING, "system\n", "user\n", "assistant\n", "You are a helpful assistant."]
    texts += [f" Options: {'; '.join(SHAPES)}."] + [f" {value}" for value in [*SHAPES, *DIGITS, NOTHING]]
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=512,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=["<|endoftext|>", *SPECIAL_TOKENS],
            show_progress=False,
        ),
    )
    return Qwen2Tokenizer(
        tokenizer_object=tokenizer,
        unk_token=None,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=list(SPECIAL_TOKENS),
        padding_side="left",
    )


def build_processor() -> MambaMiaProcessor:
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return MambaMiaProcessor(
        tokenizer=build_tokenizer(),
        image_processor=SiglipImageProcessor(size=size),
        video_processor=MambaMiaVideoProcessor(size=size),
        tokens_per_frame=1,
        frame_time_format=TIME_FORMAT,
    )


def build_model(processor: MambaMiaProcessor) -> MambaMiaForConditionalGeneration:
    """About 2.1 million parameters; the 9 patches of a frame become one anchor, with the frame's time before it."""
    tokenizer = processor.tokenizer
    config = MambaMiaConfig(
        vision_config={
            "model_type": "resnet",
            "image_size": IMAGE_SIZE,
            "patch_size": 4,  # of the stem
            "embedding_size": 32,
            "hidden_sizes": [32, 64, 128, 128],
            "depths": [1, 2, 2, 1],
            "layer_type": "basic",
        },
        text_config={
            "model_type": "qwen2",
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            "initializer_range": 0.08,  # about 1 / sqrt(hidden_size)
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": None,
        },
        compressor_config={
            "hidden_size": 128,
            "num_hidden_layers": 1,
            "head_dim": 32,
            "state_size": 32,
            "patches_per_anchor": 9,
            "initializer_range": 0.05,
        },
        image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id,
        frame_time_format=TIME_FORMAT,
        time_token_ids=time_token_ids(tokenizer, TIME_FORMAT),
        vision_feature_layer=-1,
        vision_batch_size=64,
        delta_threshold=None,
        frame_dropout=0.8,  # without it, Δ sometimes ends up smallest on the needles
    )
    model = MambaMiaForConditionalGeneration(config)
    look_back(model.model.language_model, DIGIT_DISTANCES)
    model.generation_config.max_new_tokens = 8  # an answer is one to three words
    return model


@torch.no_grad()
def look_back(language_model: Qwen2Model, distances: Sequence[int]) -> None:
    """Lets the heads of the first layer begin with reading the tokens at these distances before, one distance each.

    Rotary embeddings turn a query at position `p` by `p f` and a key at `q` by `q f`, for each frequency `f`. With the
    bias `s` of all keys and the bias `s` turned by `-d f` of the queries of a head, the score of the two is
    `sum over f of s^2 cos((p - q - d) f)`, which is largest where `p - q = d`. An anchor so reads the time of its
    frame from the beginning, which a model of this size takes long to find out by itself.
    """
    config, attention = language_model.config, language_model.layers[0].self_attn
    half = attention.head_dim // 2
    frequencies = config.rope_parameters["rope_theta"] ** (-torch.arange(half) / half)
    size = torch.where(torch.arange(half) < SHARP_FREQUENCIES, SHARPNESS, 0.0)
    attention.k_proj.bias.copy_(torch.cat([size, torch.zeros(half)]).repeat(config.num_key_value_heads))
    turned = [torch.cat([size * (d * frequencies).cos(), -size * (d * frequencies).sin()]) for d in distances]
    attention.q_proj.bias.copy_(torch.cat(turned))
