"""PEFT's adapters of all kinds: they run, generate, are saved and loaded, and merge into what they gave."""

import pytest
import torch
from peft import LoraConfig, PeftModel, TrainableTokensConfig, get_peft_model
from tiny_model import prompt, random_videos, tiny_model


IDS, VIDEOS = prompt([5, 6], 4, [7]), random_videos(1, 4)
ADAPTERS = {
    "LoRA": LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False),
    "LoRA of embeddings": LoraConfig(r=4, target_modules=["embed_tokens"], init_lora_weights=False),
    "LoRA and tokens": LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[4, 7]),
    "tokens": TrainableTokensConfig(token_indices=[4, 7], target_modules=["embed_tokens"]),
    "copies": LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head", "compressor"]),
}


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters(tmp_path, kind):
    model = get_peft_model(tiny_model(), ADAPTERS[kind])
    inputs = {"input_ids": IDS, "pixel_values_videos": VIDEOS}
    model.train()(**inputs, labels=IDS).loss.backward()
    assert any(parameter.grad is not None for parameter in model.parameters())
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
        logits = model(**inputs).logits
        embeds = model.get_input_embeddings()(IDS)
        torch.testing.assert_close(model(inputs_embeds=embeds, pixel_values_videos=VIDEOS).logits, logits)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(tiny_model(), tmp_path).eval()
        torch.testing.assert_close(loaded(**inputs).logits, logits)
        expected = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(merged(**inputs).logits, logits, atol=1e-4, rtol=1e-4)
        assert torch.equal(merged.generate(**inputs, max_new_tokens=3, do_sample=False), expected)
