"""The recipe starts from a model with times."""

from needle.small_model import build_model, build_processor

from mambamia_hf import BUNDLED_CHECKPOINT, MambaMiaForConditionalGeneration


def test_the_model_reads_times():
    processor = build_processor()
    config = build_model(processor).config
    assert config.frame_time_format == processor.frame_time_format == "mm:ss"
    assert processor.tokenizer("59:07")["input_ids"] == [config.time_token_ids[character] for character in "59:07"]


def test_the_bundled_checkpoint_has_these_weights():
    """All but the embeddings of a vocabulary, as the bundled checkpoint is from before there were times."""
    built = build_model(build_processor()).state_dict()
    bundled = MambaMiaForConditionalGeneration.from_pretrained(BUNDLED_CHECKPOINT).state_dict()
    words = {name for name in built if name.endswith("embed_tokens.weight") or name == "lm_head.weight"}
    assert built.keys() == bundled.keys()
    assert all(built[name].shape == bundled[name].shape for name in built.keys() - words)
