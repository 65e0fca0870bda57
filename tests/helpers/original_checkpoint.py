"""Checkpoints in the original layout, made here, and the models they have to become."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny_model import IMAGE_TOKEN, VIDEO_TOKEN, prompt, random_videos
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from mambamia_hf import MambaMiaConfig, MambaMiaForConditionalGeneration
from mambamia_hf.convert import compressor_from_original


SIZES = {"head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 256}
VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
    "vision_use_head": False,
}
TEXT = {
    "model_type": "qwen2",
    "vocab_size": 99,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 0,
}
PLACEHOLDERS = {"image_token_id": IMAGE_TOKEN, "video_token_id": VIDEO_TOKEN}


def original_compressor(bidirectional: bool = True, input_norm: bool = False, num_layers: int = 2) -> dict:
    """Random tensors of the released layout: 32 wide between 24 and 48, 4 heads of 16, state 8, rows of 4 patches."""
    shapes = {
        "input_proj.weight": (32, 24),
        "input_proj.bias": (32,),
        "query_token": (32,),
        "model.norm_f.weight": (32,),
        "output_proj.weight": (48, 32),
        "output_proj.bias": (48,),
    }
    if input_norm:
        shapes |= {"input_norm.weight": (32,), "input_norm.bias": (32,)}
    for layer in range(num_layers):
        block = {"norm.weight": (32,), "weight_fc.weight": (4, 32), "weight_fc.bias": (4,)}
        block |= {"gate_fc.weight": (1, 32), "gate_fc.bias": (1,)}
        block |= {"mixer.in_proj.weight": (2 * 64 + 2 * 8 + 4, 32), "mixer.out_proj.weight": (32, 64)}
        block |= {"mixer.conv1d.weight": (80, 1, 4), "mixer.conv1d.bias": (80,), "mixer.norm.weight": (64,)}
        block |= {"mixer.dt_bias": (4,), "mixer.A_log": (4,), "mixer.D": (4,)}
        if bidirectional:
            block |= {"mixer.conv1d_b.weight": (80, 1, 4), "mixer.conv1d_b.bias": (80,), "mixer.norm_b.weight": (64,)}
            block |= {"mixer.dt_bias_b": (4,), "mixer.A_b_log": (4,), "mixer.D_b": (4,)}
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
    generator = torch.Generator().manual_seed(0)
    return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


class Original:
    """A LLaVA-layout checkpoint of a SigLIP or CLIP tower, a compressor and a Qwen2 or Llama of two layers each."""

    def __init__(self, text: dict = (), vision: dict = (), projector: str = "mm_projector", flat: bool = False):
        torch.manual_seed(0)
        text_config = AutoConfig.for_model(**{**TEXT, **dict(text)})
        self.text = AutoModelForCausalLM.from_config(text_config)
        self.vision = AutoModel.from_config(AutoConfig.for_model(**{**VISION, **dict(vision)}))
        self.compressor = original_compressor()
        tower = "model.vision_tower.vision_tower." + ("" if flat else "vision_model.")
        self.tensors = {
            **{tower + name: tensor for name, tensor in self.vision.state_dict().items()},
            **{f"model.{projector}.{name}": tensor for name, tensor in self.compressor.items()},
            **self.text.state_dict(),
        }
        if text_config.tie_word_embeddings:
            del self.tensors["lm_head.weight"]
        self.config = {
            **text_config.to_dict(),
            "architectures": ["LlavaQwenForCausalLM"],
            "model_type": {"qwen2": "llava_qwen", "llama": "llava_llama"}[text_config.model_type],
            "rope_theta": text_config.rope_parameters["rope_theta"],
            "image_aspect_ratio": "square",
            "mm_vision_tower": "tower",
            "mm_vision_select_layer": -2,
            "mm_projector_type": "some_name_of_a_projector",
            "mm_hidden_size": 24,
            "torch_dtype": "float32",
        }
        del self.config["rope_parameters"], self.config["dtype"]

    def write(self, folder: Path, form: str = "safetensors", num_shards: int = 3) -> Path:
        """Writes it as one safetensors or .bin file, or as several of them with an index."""
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(self.config))
        self.vision.config.save_pretrained(folder / "tower")
        kind, _, sharded = form.partition("-")
        name = {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}[kind]
        save = {"safetensors": save_file, "bin": torch.save}[kind]
        if not sharded:
            save(self.tensors, folder / name)
            return folder
        stem, suffix = name.split(".")
        weight_map = {}
        for shard in range(num_shards):
            file = f"{stem}-{shard + 1:05d}-of-{num_shards:05d}.{suffix}"
            first, end = (len(self.tensors) * edge // num_shards for edge in (shard, shard + 1))
            part = dict(list(self.tensors.items())[first:end])
            save(part, folder / file)
            weight_map |= dict.fromkeys(part, file)
        (folder / f"{name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        return folder

    def model(self) -> MambaMiaForConditionalGeneration:
        """The same weights put together by hand."""
        compressor = compressor_from_original(self.compressor, **SIZES)
        config = MambaMiaConfig(
            vision_config=self.vision.config,
            text_config=self.text.config,
            compressor_config=compressor.config,
            delta_threshold=None,
            **PLACEHOLDERS,
        )
        model = MambaMiaForConditionalGeneration(config).eval()
        model.model.vision_tower.load_state_dict(self.vision.state_dict())
        model.model.language_model.load_state_dict(self.text.model.state_dict())
        model.lm_head.load_state_dict(self.text.lm_head.state_dict())
        model.model.compressor.load_state_dict(compressor.state_dict())
        return model


def image_model(**kwargs) -> Original:
    """LLaVA's model of images, with which the paper's recipe begins: an MLP in the compressor's place."""
    original = Original(**kwargs)
    original.tensors = {name: tensor for name, tensor in original.tensors.items() if "mm_projector" not in name}
    original.tensors |= {f"model.mm_projector.{layer}.weight": torch.zeros(48, 24 * layer or 24) for layer in (0, 2)}
    original.tensors |= {f"model.mm_projector.{layer}.bias": torch.zeros(48) for layer in (0, 2)}
    original.config["mm_projector_type"] = "mlp2x_gelu"
    return original


def load(folder: Path) -> MambaMiaForConditionalGeneration:
    model, info = MambaMiaForConditionalGeneration.from_pretrained(folder, output_loading_info=True, **PLACEHOLDERS)
    assert not any(info.values()), info
    return model.eval()


def logits(model: MambaMiaForConditionalGeneration) -> torch.Tensor:
    inputs = {"input_ids": prompt([5, 6], 3, [7, 8, 9]), "pixel_values_videos": random_videos(1, 3)}
    with torch.no_grad():
        return model(**inputs).logits


def weights(folder: Path) -> dict:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
