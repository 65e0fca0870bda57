"""Configurations of MambaMia: the compressor alone, and vision tower + compressor + language model."""

import math
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from .checkpoint_files import check_settings, explained, well_typed
from .checkpoint_layout import check_layout
from .frame_selection import frame_budget
from .frame_times import time_characters, time_width
from .versions import warn_if_untested


# Options of `from_pretrained` that tell where the files of a checkpoint are.
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


@strict
class MambaMiaCompressorConfig(PreTrainedConfig):
    r"""Configuration of [`MambaMiaCompressor`]; the defaults are the full-size compressor of the paper.

    Args:
        input_size (`int`, defaults to 1152): width of the vision tower's patch features.
        output_size (`int`, defaults to 3584): width of the language model's embeddings.
        hidden_size (`int`, defaults to 3072): width of the compressor.
        num_hidden_layers (`int`, defaults to 3): blocks of stage 1, over the patches and anchors of all frames.
        num_temporal_layers (`int`, defaults to 1): blocks of stage 2, the Time Axis Aggregator over the frames.
        expand (`int`, defaults to 2): inner width of a mixer over `hidden_size`.
        head_dim (`int`, defaults to 64): size of a head; has to divide `expand * hidden_size`.
        state_size (`int`, defaults to 128): size of a head's state for each of its channels.
        n_groups (`int`, defaults to 1): groups of heads that share B and C.
        conv_kernel (`int`, defaults to 4): taps of the causal convolution.
        chunk_size (`int`, defaults to 256): chunk length of the scan; changes the speed on a GPU, never the result.
        patches_per_anchor (`int`, defaults to 24): patches in a row, after which one anchor is inserted.
        bidirectional (`bool`, defaults to `True`): whether stage 1 scans both ways.
        temporal_bidirectional (`bool`, defaults to `False`): whether stage 2 does. Δ is the forward scan's.
        mixer_type (`str`, defaults to `"mamba2"`): `"mamba2"`, or `"mamba1"`, which takes no heads and no groups.
        input_norm (`bool`, defaults to `False`): whether a layer norm follows the insertion of the anchors.
        gpa_placement (`str`, *optional*, defaults to `"post_mixer"`): `"post_mixer"` replaces the anchors in the
            residual stream after each mixer (the paper's equations); `"pre_mixer"` replaces them in the mixer's input
            only and keeps the gate within [0.01, 0.99] (the released code); `None` leaves GPA out.
        gpa_dropout (`float`, defaults to 0.1): dropout on the anchor on its way into the attention and the gate.
        length_scale (`float`, defaults to 1.0): in training, stage 2's Δ of the quieter half of a video's frames is
            multiplied by a random factor, as if the video were up to `length_scale` times longer and nothing happened
            in the added time. The memory of stage 2 then survives videos longer than those of training. Not in the
            paper.
        time_step_limit (`tuple`, defaults to `(0.0, inf)`): range that Δ is clamped to.
        time_step_min, time_step_max (`float`, default to 0.001 and 0.1): Δ at initialisation is log-uniform between.
        time_step_floor (`float`, defaults to 1e-4): Δ at initialisation is at least this.
        A_init_min, A_init_max (`float`, default to 1 and 16): -A at initialisation is uniform between.
        rms_norm_eps (`float`, defaults to 1e-5): epsilon of every norm.
        initializer_range (`float`, defaults to 0.02): standard deviation of the initial weights.
        initialization (`str`, defaults to `"mamba"`): `"mamba"` draws A and the anchor as above; `"released"` begins
            as the released code does: -A of head n is n, the anchor has a standard deviation of `hidden_size ** -0.5`,
            and the outer projections are Xavier-uniform.

    Raises:
        ValueError: for settings that cannot be built, naming the field.
    """

    model_type = "mambamia_compressor"
    base_config_key = "compressor_config"

    input_size: int = 1152
    output_size: int = 3584
    hidden_size: int = 3072
    num_hidden_layers: int = 3
    num_temporal_layers: int = 1
    expand: int = 2
    head_dim: int = 64
    state_size: int = 128
    n_groups: int = 1
    conv_kernel: int = 4
    chunk_size: int = 256
    patches_per_anchor: int = 24
    bidirectional: bool = True
    temporal_bidirectional: bool = False
    mixer_type: Literal["mamba2", "mamba1"] = "mamba2"
    input_norm: bool = False
    gpa_placement: Literal["post_mixer", "pre_mixer"] | None = "post_mixer"
    gpa_dropout: float | int = 0.1
    length_scale: float | int = 1.0
    time_step_limit: list[float | int] | tuple[float | int, ...] = (0.0, float("inf"))
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    A_init_min: float | int = 1
    A_init_max: float | int = 16
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    initialization: Literal["mamba", "released"] = "mamba"

    def __post_init__(self, **kwargs: Any) -> None:
        self.time_step_limit = tuple(float(bound) for bound in self.time_step_limit)
        super().__post_init__(**kwargs)
        self.validate_architecture()  # here too, so that construction raises the ValueError itself

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """As any configuration's, or that of the whole model around the compressor; refuses a checkpoint of another
        model, and names the converter."""
        model_types = (cls.model_type, MambaMiaConfig.model_type)
        return _own_config_dict(super().get_config_dict, model_types, *args, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As any configuration's, with one sentence for a setting of a wrong type."""
        with well_typed():
            return super().from_dict(config_dict, **kwargs)

    @classmethod
    def for_language_model(cls, text_config: PreTrainedConfig, **settings: Any) -> "MambaMiaCompressorConfig":
        """A new compressor as wide as a language model, rounded to whole heads, and at most as wide as the paper's.

        Args:
            text_config: of the language model.
            settings: of the compressor, in place of those that follow from the language model.
        """
        head_dim, expand = settings.get("head_dim", cls.head_dim), settings.get("expand", cls.expand)
        step = head_dim // math.gcd(head_dim, expand)
        width = max(min(text_config.hidden_size, cls.hidden_size) // step, 1) * step
        return cls(**{"patches_per_anchor": 1, "hidden_size": width, **settings})

    @property
    def intermediate_size(self) -> int:
        return self.expand * self.hidden_size

    @property
    def num_heads(self) -> int:
        return self.intermediate_size // self.head_dim

    @property
    def A_init_range(self) -> tuple[float, float]:
        return self.A_init_min, self.A_init_max

    def num_anchors(self, num_patches: int) -> int:
        """Anchors of a frame of `num_patches` patches: one after each row of `patches_per_anchor`.

        Raises:
            ValueError: if the patches are not a whole number of rows.
        """
        if num_patches % self.patches_per_anchor:
            raise ValueError(
                f"A frame of {num_patches} patches is not a whole number of rows of patches_per_anchor="
                f"{self.patches_per_anchor}; set patches_per_anchor to a divisor of {num_patches}."
            )
        return num_patches // self.patches_per_anchor

    def validate_architecture(self) -> None:
        """Part of `@strict`-powered validation: the settings have to fit each other."""
        super().validate_architecture()
        self._validate_sizes()
        self._validate_ranges()

    def _validate_sizes(self) -> None:
        check_settings(vars(self))
        if self.num_hidden_layers < 1:
            raise ValueError(f"num_hidden_layers must be at least 1, not {self.num_hidden_layers}.")
        if self.intermediate_size % self.head_dim:
            raise ValueError(
                f"head_dim={self.head_dim} does not divide expand * hidden_size = {self.intermediate_size}; "
                f"set head_dim to a divisor of it."
            )
        if self.num_heads % self.n_groups:
            raise ValueError(
                f"n_groups={self.n_groups} does not divide the {self.num_heads} heads of expand * hidden_size / "
                f"head_dim; set n_groups to a divisor of it."
            )

    def _validate_ranges(self) -> None:
        if len(self.time_step_limit) != 2 or not 0 <= self.time_step_limit[0] < self.time_step_limit[1]:
            raise ValueError(f"time_step_limit must be two rising numbers from 0 on, not {self.time_step_limit}.")
        for low, high in (("time_step_min", "time_step_max"), ("A_init_min", "A_init_max")):
            if not 0 < getattr(self, low) <= getattr(self, high):
                raise ValueError(
                    f"{low} must lie above 0 and at most at {high}, not {getattr(self, low)} with "
                    f"{high}={getattr(self, high)}."
                )
        for name in ("time_step_floor", "rms_norm_eps", "initializer_range"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)}.")
        if self.length_scale < 1:
            raise ValueError(f"length_scale must be at least 1, not {self.length_scale}.")
        if not 0 <= self.gpa_dropout < 1:
            raise ValueError(f"gpa_dropout must lie in [0, 1), not {self.gpa_dropout}.")


# SigLIP2 so400m, 384 px, patch 16.
_VISION_CONFIG = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 16,
    "vision_use_head": False,
}
# Qwen2-7B.
_TEXT_CONFIG = {
    "model_type": "qwen2",
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
}

# The language models of the paper, each with its frame selection. Vicuna has no placeholders: two tokens are added.
_PRESETS = {
    "qwen2-7b": {},
    "vicuna-7b": {
        "text_config": {
            "model_type": "llama",
            "vocab_size": 32002,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
        },
        "image_token_id": 32000,
        "video_token_id": 32001,
        "delta_threshold": 0.5,
        "delta_min_frames": 64,
    },
}


@strict
class MambaMiaConfig(PreTrainedConfig):
    r"""Configuration of [`MambaMiaForConditionalGeneration`]; the defaults are the full-size model of the paper.

    Args:
        vision_config (`PreTrainedConfig` or `dict`): the vision tower, by default SigLIP2 so400m, 384 px, patch 16.
        text_config (`PreTrainedConfig` or `dict`): any causal language model, by default Qwen2-7B.
        compressor_config (`MambaMiaCompressorConfig` or `dict`): the compressor; its `input_size` and `output_size`
            are taken from the other two.
        image_token_id (`int`, defaults to 151655): placeholder of an image's tokens in the prompt.
        video_token_id (`int`, defaults to 151656): placeholder of a video's tokens in the prompt.
        vision_feature_layer (`int`, defaults to -2): which hidden state of the vision tower is taken.
        vision_feature_norm (`bool`, defaults to `False`): whether the tower's final layer norm follows, as in
            checkpoints of the authors' code, whose towers end at the layer that is taken.
        end_of_frame (`bool`, defaults to `False`): whether a learned vector follows the anchors of each frame.
        frame_time_format (`str`, *optional*): the time of each kept frame is written before its tokens, as `"mm:ss"`,
            `"h:mm:ss"` or `"mm:ss.d"`; `None` writes none. Not in the paper.
        time_token_ids (`dict`, *optional*): with a format, the language model's token of each character of a time, as
            of [`~frame_times.time_token_ids`].
        vision_batch_size (`int`, defaults to 16): frames that go through the vision tower at once.
        delta_threshold (`float`, *optional*, defaults to 0.6): a frame is kept each time the accumulated Δ reaches it
            (the paper's Algorithm 1), at inference only; `None` keeps every frame.
        delta_min_frames (`int`, defaults to 180): videos of at most this many frames keep every frame.
        keep_frames (`int`, *optional*): exact budget in place of the threshold: this many frames are kept.
        keep_ratio (`float`, *optional*): exact budget in place of the threshold: this share of the frames is kept.
        frame_dropout (`float`, defaults to 0.0): in training and without a budget, a share of the frames of a video,
            drawn between 0 and this, does not go on, at random; the paper has none. What they showed has to be
            remembered, through Δ.
        delta_loss_coef (`float`, defaults to 0.0): weight of the mean Δ of the frames of videos in the loss; the paper
            has none. Where Δ costs, it is large only for frames that add something.

    Raises:
        ValueError: for settings that cannot be built, naming the field.
    """

    model_type = "mambamia"
    keys_to_ignore_at_inference: ClassVar[list[str]] = [  # not gathered by `Trainer` in evaluation
        "cache",
        "past_key_values",
        "cache_params",
        "image_outputs",
        "video_outputs",
        "token_indices",
    ]
    sub_configs: ClassVar[dict[str, Any]] = {
        "vision_config": AutoConfig,
        "text_config": AutoConfig,
        "compressor_config": MambaMiaCompressorConfig,
    }

    if TYPE_CHECKING:  # after construction
        vision_config: PreTrainedConfig
        text_config: PreTrainedConfig
        compressor_config: MambaMiaCompressorConfig
    else:  # what construction takes
        vision_config: dict | PreTrainedConfig | None = None
        text_config: dict | PreTrainedConfig | None = None
        compressor_config: dict | PreTrainedConfig | None = None
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_feature_layer: int = -2
    vision_feature_norm: bool = False
    end_of_frame: bool = False
    frame_time_format: str | None = None
    time_token_ids: dict[str, int] | None = None
    vision_batch_size: int = 16
    delta_threshold: float | int | None = 0.6
    delta_min_frames: int = 180
    keep_frames: int | None = None
    keep_ratio: float | int | None = None
    frame_dropout: float | int = 0.0
    delta_loss_coef: float | int = 0.0
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        warn_if_untested()
        self.vision_config = _sub_config(self.vision_config, _VISION_CONFIG)
        self.text_config = _sub_config(self.text_config, _TEXT_CONFIG)
        if not isinstance(self.compressor_config, PreTrainedConfig):
            self.compressor_config = MambaMiaCompressorConfig(**(self.compressor_config or {}))
        super().__post_init__(**kwargs)
        self.compressor_config.input_size = self.vision_hidden_size
        self.compressor_config.output_size = self.text_config.hidden_size
        self.tie_word_embeddings = self.tie_word_embeddings or self.text_config.tie_word_embeddings
        self.validate_architecture()

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """As any configuration's; refuses a checkpoint of another model, and names the converter."""
        return _own_config_dict(super().get_config_dict, (cls.model_type,), *args, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As any configuration's, with one sentence for a setting of a wrong type or a part that is missing."""
        for name in cls.sub_configs:
            if name in config_dict and config_dict[name] is None:  # the defaults would be a model of 8 billion weights
                raise ValueError(f"The configuration has no {name}; it is damaged.")
        with well_typed():
            return super().from_dict(config_dict, **kwargs)

    @classmethod
    def from_preset(cls, name: str, **kwargs: Any) -> "MambaMiaConfig":
        """A configuration of the paper: `"qwen2-7b"` (the default one) or `"vicuna-7b"`; `kwargs` override its fields.

        Raises:
            ValueError: if there is no preset of that name.
        """
        if name not in _PRESETS:
            raise ValueError(f"There is no preset '{name}'; choose from {', '.join(_PRESETS)}.")
        return cls(**{**_PRESETS[name], **kwargs})

    def patch_grid(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """Rows and columns of the patches that the vision tower makes of a frame, by default of its own size."""
        vision = self.vision_config
        patch_height, patch_width = _pair(vision.patch_size)
        if height is None or width is None:
            if not hasattr(vision, "image_size"):  # SigLIP2 that takes any size is trained on so many patches
                return (math.isqrt(vision.num_patches),) * 2
            height, width = _pair(vision.image_size)
        # ConvNeXt, ResNet: every stage after the first halves the feature map.
        halvings = 2**self._vision_stage if hasattr(vision, "hidden_sizes") else 1
        return height // patch_height // halvings, width // patch_width // halvings

    def tokens_per_frame(self, height: int | None = None, width: int | None = None) -> int:
        """Tokens per frame for the language model: its anchors, and the end-of-frame vector if there is one.

        Args:
            height, width: of a frame in pixels, by default the vision tower's own size.

        Raises:
            ValueError: if the patches are not a whole number of rows.
        """
        rows, columns = self.patch_grid(height, width)
        return self.compressor_config.num_anchors(rows * columns) + self.end_of_frame

    @property
    def frame_time_width(self) -> int:
        """Tokens of the time of a frame of a video; 0 where no times are written."""
        return time_width(self.frame_time_format)

    def placeholders_per_frame(self, height: int | None = None, width: int | None = None) -> int:
        """Placeholders of a frame of a video in the prompt: those of its time, then `tokens_per_frame`."""
        return self.frame_time_width + self.tokens_per_frame(height, width)

    @property
    def vision_hidden_size(self) -> int:
        """Width of the vision tower's patches."""
        vision = self.vision_config
        if not hasattr(vision, "hidden_sizes"):
            return vision.hidden_size
        stem = getattr(vision, "embedding_size", vision.hidden_sizes[0])
        return (stem, *vision.hidden_sizes)[self.vision_layer(self.vision_feature_layer)]

    @property
    def _vision_stage(self) -> int:
        """The stage of a ConvNeXt or ResNet whose feature map is taken, from 0; the stem's size is the first's."""
        return max(self.vision_layer(self.vision_feature_layer) - 1, 0)

    def vision_layer(self, vision_feature_layer: int) -> int:
        """The hidden state of the vision tower that `vision_feature_layer` stands for, counted from the first.

        Raises:
            ValueError: if the tower has no such hidden state.
        """
        num_layers = len(getattr(self.vision_config, "hidden_sizes", ())) or self.vision_config.num_hidden_layers
        if not -num_layers - 1 <= vision_feature_layer <= num_layers:
            raise ValueError(
                f"vision_feature_layer={vision_feature_layer} is not a hidden state of a vision tower of {num_layers} "
                f"layers; set it to {-num_layers - 1} to {num_layers}."
            )
        return vision_feature_layer % (num_layers + 1)

    def validate_architecture(self) -> None:
        """Part of `@strict`-powered validation: the settings have to fit each other."""
        super().validate_architecture()
        check_settings(vars(self))
        self.vision_layer(self.vision_feature_layer)
        self.tokens_per_frame()  # raises where the patches are not a whole number of rows
        if self.vision_feature_norm and getattr(self.vision_config, "hidden_sizes", None):
            raise ValueError(
                f"vision_feature_norm=True needs a vision tower with a final layer norm, and "
                f"{self.vision_config.model_type} has feature maps; set it to False."
            )
        self._validate_tokens()
        self._validate_times()
        if self.vision_batch_size < 1:
            raise ValueError(f"vision_batch_size must be at least 1, not {self.vision_batch_size}.")
        if self.delta_min_frames < 0:
            raise ValueError(f"delta_min_frames must not be negative, not {self.delta_min_frames}.")
        if not 0 <= self.frame_dropout <= 1:
            raise ValueError(f"frame_dropout must lie between 0 and 1, not {self.frame_dropout}.")
        for name in ("delta_threshold", "delta_loss_coef"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name} must not be negative, not {value}.")
        frame_budget(1, self.keep_frames, self.keep_ratio)
        if self.delta_threshold is not None and (self.keep_frames is not None or self.keep_ratio is not None):
            raise ValueError(
                f"delta_threshold={self.delta_threshold} and a budget (keep_frames={self.keep_frames}, "
                f"keep_ratio={self.keep_ratio}) exclude each other; set delta_threshold=None to use the budget."
            )
        for name in ("delta_threshold", "keep_frames", "keep_ratio"):
            if getattr(self, name) is not None and not self.compressor_config.num_temporal_layers:
                raise ValueError(
                    f"{name}={getattr(self, name)} needs the Δ of a temporal layer, and num_temporal_layers is 0; set "
                    f"{name}=None to keep every frame."
                )

    def _validate_times(self) -> None:
        vocab_size = self.text_config.vocab_size
        for character in time_characters(self.frame_time_format):
            token_id = (self.time_token_ids or {}).get(character)
            if token_id is None or not 0 <= token_id < vocab_size:
                raise ValueError(
                    f"frame_time_format={self.frame_time_format!r} needs the token of {character!r} in "
                    f"time_token_ids, below vocab_size={vocab_size}, not {token_id}; take them from "
                    f"`frame_times.time_token_ids`."
                )

    def _validate_tokens(self) -> None:
        if self.image_token_id == self.video_token_id:
            raise ValueError(f"image_token_id and video_token_id must differ, both are {self.image_token_id}.")
        for name in ("image_token_id", "video_token_id"):
            if not 0 <= getattr(self, name) < 2**31:
                raise ValueError(f"{name} must be the number of a token, from 0 on, not {getattr(self, name)}.")


def config_beside(name: str | os.PathLike[str], options: Mapping[str, Any]) -> dict[str, Any]:
    """The content of the config.json of the model beside a processor, empty where the processor is alone.

    Args:
        name: folder or Hub name.
        options: of `from_pretrained`; those that tell where to look are heeded.

    Raises:
        ValueError: if the model is in the layout of the authors' code.
    """
    known = {option: options[option] for option in _HUB_OPTIONS if option in options}
    try:
        config, _ = PreTrainedConfig.get_config_dict(name, **known)
    except OSError:
        return {}
    check_layout(config, name)
    return config


def _own_config_dict(
    read: Callable[..., tuple[Any, dict[str, Any]]], model_types: tuple[str, ...], *args: Any, **kwargs: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `read` of Transformers gives with these arguments, checked to be of a model of one of these types."""
    name = args[0] if args else kwargs.get("pretrained_model_name_or_path", "a model")
    with well_typed():
        config_dict, unused = read(*args, **kwargs)
    if not isinstance(config_dict, dict):
        raise ValueError(f"The config.json of {name} is no JSON object.")
    check_layout(config_dict, name, model_types)
    return config_dict, unused


def _sub_config(given: dict[str, Any] | PreTrainedConfig | None, default: dict[str, Any]) -> PreTrainedConfig:
    """A configuration as it is, from a dictionary (of the default's type if that names none), or the default."""
    if isinstance(given, PreTrainedConfig):
        return given
    if not isinstance(given, dict | None):
        raise ValueError(f"{given!r} is no configuration of a model; give a dictionary of its settings.")
    settings = dict(default if given is None else given)
    model_type = settings.pop("model_type", default["model_type"])
    with explained(f"There is no {model_type} of these settings"):
        check_settings(settings)
        return CONFIG_MAPPING[model_type](**settings)


def _pair(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return height, width


# Servers and trainers look up here what a model takes; `register` of the Auto classes adds nothing.
for _names in (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES):
    _names.setdefault(MambaMiaConfig.model_type, "MambaMiaForConditionalGeneration")


__all__ = ["MambaMiaCompressorConfig", "MambaMiaConfig", "config_beside"]
