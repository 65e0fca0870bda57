"""The recipe starts from the model that the bundled checkpoint was."""

from needle.small_model import build_model, build_processor, build_tokenizer
from transformers import AutoTokenizer

from mambamia_hf import BUNDLED_CHECKPOINT, MambaMiaForConditionalGeneration


def test_the_bundled_checkpoint_has_this_vocabulary():
    assert build_tokenizer().get_vocab() == AutoTokenizer.from_pretrained(BUNDLED_CHECKPOINT).get_vocab()


def test_the_bundled_checkpoint_has_these_weights():
    built = build_model(build_processor()).state_dict()
    bundled = MambaMiaForConditionalGeneration.from_pretrained(BUNDLED_CHECKPOINT).state_dict()
    assert {name: tensor.shape for name, tensor in built.items()} == {
        name: tensor.shape for name, tensor in bundled.items()
    }
