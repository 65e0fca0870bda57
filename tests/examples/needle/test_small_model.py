"""The recipe starts from the model that the bundled checkpoint was."""

import torch
from needle.small_model import DIGIT_DISTANCES, build_model, build_processor, build_tokenizer
from transformers import AutoTokenizer, set_seed

from mambamia_hf import BUNDLED_CHECKPOINT, MambaMiaForConditionalGeneration


def test_the_bundled_checkpoint_has_this_vocabulary():
    assert build_tokenizer().get_vocab() == AutoTokenizer.from_pretrained(BUNDLED_CHECKPOINT).get_vocab()


def test_the_bundled_checkpoint_has_these_weights():
    built = build_model(build_processor()).state_dict()
    bundled = MambaMiaForConditionalGeneration.from_pretrained(BUNDLED_CHECKPOINT).state_dict()
    assert {name: tensor.shape for name, tensor in built.items()} == {
        name: tensor.shape for name, tensor in bundled.items()
    }


def test_the_first_heads_read_the_digits_of_a_time():
    """Each mostly one token of its own, wherever it stands: in `mm:ss` before an anchor, the four digits."""
    set_seed(0)
    model = build_model(build_processor()).model.language_model.eval()
    model.set_attn_implementation("eager")
    embeddings = torch.randn(1, 40, model.config.hidden_size)
    with torch.no_grad():
        (weights, *_) = model(inputs_embeds=embeddings, output_attentions=True).attentions
    for head, distance in enumerate(DIGIT_DISTANCES):
        at_distance = weights[0, head].diagonal(-distance)
        assert at_distance[5:].median() > 0.8, f"head {head} reads {distance} tokens before"
