"""Every variant that the paper names: each builds, learns a step, generates, saves and loads."""

import pytest
import torch
from tiny_model import IMAGE_SIZE, TEXT_CONFIG, VIDEO_TOKEN, VISION_CONFIG, VOCAB_SIZE
from transformers import AutoModelForCausalLM, Siglip2ImageProcessor

from mambamia_hf import MambaMiaConfig, MambaMiaForConditionalGeneration


COMMON_TEXT = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0}
ATTENTION = {"intermediate_size": 64, "num_attention_heads": 4, "max_position_embeddings": 512}
TEXT = {
    "qwen2": TEXT_CONFIG,
    "llama": {"model_type": "llama", **COMMON_TEXT, **ATTENTION, "eos_token_id": None},
    "gpt_neox": {"model_type": "gpt_neox", **COMMON_TEXT, **ATTENTION, "eos_token_id": None},
    "mamba2": {
        "model_type": "mamba2",
        **COMMON_TEXT,
        "num_heads": 4,
        "head_dim": 16,
        "state_size": 16,
        "n_groups": 1,
        "chunk_size": 16,
        "eos_token_id": None,
    },
}
TRANSFORMER = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {
    "siglip": VISION_CONFIG,
    "siglip2": {"model_type": "siglip2_vision_model", **TRANSFORMER, "patch_size": 8, "num_patches": 16},
    "clip": {"model_type": "clip_vision_model", **TRANSFORMER, "image_size": IMAGE_SIZE, "patch_size": 8},
    "convnext": {
        "model_type": "convnext",
        "image_size": IMAGE_SIZE,
        "patch_size": 4,
        "hidden_sizes": [8, 16],
        "depths": [1, 1],
        "num_stages": 2,
    },
    "resnet": {
        "model_type": "resnet",
        "image_size": IMAGE_SIZE,
        "patch_size": 4,
        "embedding_size": 4,
        "hidden_sizes": [8, 16],
        "depths": [1, 1],
        "layer_type": "basic",
    },
}
COMPRESSOR = {"hidden_size": 32, "num_hidden_layers": 2, "head_dim": 16, "state_size": 8, "patches_per_anchor": 4}


def build(text="qwen2", vision="siglip", compressor=(), **kwargs) -> MambaMiaForConditionalGeneration:
    torch.manual_seed(0)
    settings = {"image_token_id": 3, "video_token_id": VIDEO_TOKEN, "delta_threshold": 0.1, "delta_min_frames": 2}
    config = MambaMiaConfig(
        vision_config=dict(VISION[vision]),
        text_config=dict(TEXT[text]),
        compressor_config={**COMPRESSOR, **dict(compressor)},
        **{**settings, **kwargs},
    )
    return MambaMiaForConditionalGeneration(config)


def question(model, num_frames: int, height: int = IMAGE_SIZE, width: int = IMAGE_SIZE) -> dict[str, torch.Tensor]:
    tokens = num_frames * model.config.tokens_per_frame(height, width)
    generator = torch.Generator().manual_seed(0)
    return {
        "input_ids": torch.tensor([[11, 12] + [VIDEO_TOKEN] * tokens + [13, 14]]),
        "pixel_values_videos": torch.randn(1, num_frames, 3, height, width, generator=generator),
    }


def learn_generate_save_load(model, tmp_path, **size):
    inputs = question(model, 5, **size)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    compressor = model.model.compressor
    assert all(parameter.grad is not None for parameter in compressor.parameters())
    optimizer.step()
    model.eval()
    arguments = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": [3, VIDEO_TOKEN]}
    output = model.generate(**inputs, **arguments)
    assert output.shape[1] == inputs["input_ids"].shape[1] + 4
    assert torch.equal(model.generate(**inputs, **arguments, use_cache=False), output)
    model.save_pretrained(tmp_path)
    loaded = MambaMiaForConditionalGeneration.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("text", TEXT)
def test_text_model(text, tmp_path):
    learn_generate_save_load(build(text=text), tmp_path)


@pytest.mark.parametrize("text", TEXT)
def test_wrapped_text_model_is_still_that_model(text):
    model = build(text=text).eval()
    bare = AutoModelForCausalLM.from_config(model.config.text_config).eval()
    bare.base_model.load_state_dict(model.model.language_model.state_dict())
    bare.get_output_embeddings().load_state_dict(model.lm_head.state_dict())
    ids = torch.tensor([[11, 12, 13, 14, 15], [21, 22, 23, 24, 25]])
    torch.testing.assert_close(model(ids).logits, bare(ids).logits)
    arguments = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(ids, **arguments), bare.generate(ids, **arguments))


@pytest.mark.parametrize("vision_feature_layer", [-2, -1, 0])
@pytest.mark.parametrize("vision", VISION)
def test_vision_tower(vision, vision_feature_layer, tmp_path):
    learn_generate_save_load(build(vision=vision, vision_feature_layer=vision_feature_layer), tmp_path)


@pytest.mark.parametrize("vision", VISION)
def test_frames_that_are_not_square(vision, tmp_path):
    model = build(vision=vision, vision_feature_layer=-1)
    features = model.get_video_features(question(model, 3, 32, 64)["pixel_values_videos"])
    assert features.last_hidden_state.shape[2] == 2 * model.config.tokens_per_frame()
    learn_generate_save_load(model, tmp_path, height=32, width=64)


def test_frozen_vision_tower_stays_as_it_is():
    model = build(vision="siglip")
    model.config.vision_config.attention_dropout = 0.5
    frames = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    before = model.eval().model.encode_frames(frames).last_hidden_state
    model.model.vision_tower.requires_grad_(False)
    model.train()
    assert model.model.compressor.training
    assert torch.equal(model.model.encode_frames(frames).last_hidden_state, before)
    model.model.vision_tower.requires_grad_(True)
    model.train()
    assert all(module.training for module in model.modules())


def test_batch_norms_of_a_vision_tower_keep_their_statistics():
    """Frames of one video have others; with them, the bundled model began a training with a loss of 5.5, not 0."""
    model = build(vision="resnet")
    frames = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    before = model.eval().model.encode_frames(frames).last_hidden_state
    features = model.train().model.encode_frames(frames).last_hidden_state
    assert torch.equal(features, before)
    features.sum().backward()
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert any(norm.weight.grad is not None for norm in norms)
    assert not any(norm.num_batches_tracked for norm in norms)


def test_clip_class_token_is_dropped():
    model = build(vision="clip", vision_feature_layer=-1).eval()
    frames = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    hidden_states = model.model.vision_tower(frames, output_hidden_states=True).hidden_states[-1]
    assert hidden_states.shape[1] == 17
    assert torch.equal(model.model.encode_frames(frames).last_hidden_state, hidden_states[:, 1:])


def test_siglip2_gets_what_its_own_processor_makes():
    image = torch.randint(0, 256, (3, 16, 24), dtype=torch.uint8)
    processor = Siglip2ImageProcessor(
        patch_size=8, max_num_patches=6, do_resize=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    expected = processor(image, return_tensors="pt")
    frame = (image[None] / 255 - 0.5) / 0.5
    patches, shape = build(vision="siglip2").model._tower_inputs(frame)
    torch.testing.assert_close(patches, expected["pixel_values"])
    assert torch.equal(shape["spatial_shapes"], expected["spatial_shapes"])


@pytest.mark.parametrize(
    "compressor",
    [
        {"mixer_type": "mamba1"},
        {"bidirectional": False},
        {"gpa_placement": "pre_mixer"},
        {"gpa_placement": None},
        {"temporal_bidirectional": True},
        {"patches_per_anchor": 2},
        {"patches_per_anchor": 8},
        {"patches_per_anchor": 16},
    ],
    ids=str,
)
def test_compressor(compressor, tmp_path):
    learn_generate_save_load(build(compressor=compressor), tmp_path)


def test_no_temporal_layer(tmp_path):
    learn_generate_save_load(build(compressor={"num_temporal_layers": 0}, delta_threshold=None), tmp_path)


def test_end_of_frame_vector(tmp_path):
    model = build(end_of_frame=True)
    assert model.config.tokens_per_frame() == 5
    features = model.get_video_features(question(model, 3)["pixel_values_videos"])
    assert torch.equal(features.pooler_output[0][4::5], model.model.end_of_frame.expand(3, -1))
    learn_generate_save_load(model, tmp_path)


def test_presets():
    qwen2, vicuna = map(MambaMiaConfig.from_preset, ("qwen2-7b", "vicuna-7b"))
    assert qwen2 == MambaMiaConfig()
    assert (qwen2.delta_min_frames, qwen2.delta_threshold) == (180, 0.6)
    assert (vicuna.delta_min_frames, vicuna.delta_threshold) == (64, 0.5)
    assert vicuna.text_config.model_type == "llama" and vicuna.compressor_config.output_size == 4096
    assert MambaMiaConfig.from_preset("vicuna-7b", delta_threshold=None).delta_threshold is None
    with pytest.raises(ValueError, match="qwen2-7b, vicuna-7b"):
        MambaMiaConfig.from_preset("pythia")


def test_full_size_counts():
    with torch.device("meta"):
        model = MambaMiaForConditionalGeneration(MambaMiaConfig())

    def count(module):
        return sum(parameter.numel() for parameter in module.parameters())

    assert abs(count(model.model.compressor) / 247e6 - 1) < 0.01
    assert count(model.model.compressor) == 245_891_371
    assert count(model.model.language_model) + count(model.lm_head) == 7_615_616_512
    assert count(model.model.vision_tower) == 413_018_352
