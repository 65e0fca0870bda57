"""The small model of the needle benchmark before it has learned anything: tokenizer, processor and weights."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer, SiglipImageProcessor

from mambamia_hf import MambaMiaConfig, MambaMiaForConditionalGeneration, MambaMiaProcessor, MambaMiaVideoProcessor
from mambamia_hf.frame_times import time_token_ids
from mambamia_hf.tokenization_mambamia import SPECIAL_TOKENS

from .glyphs import COLOURS, DIGITS, SHAPES
from .questions import CHOICE_QUESTIONS, NOTHING, OPEN_QUESTIONS


IMAGE_SIZE = 96
TIME_FORMAT = "mm:ss"


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
    model.generation_config.max_new_tokens = 8  # an answer is one to three words
    return model
