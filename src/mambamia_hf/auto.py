"""The classes of the package, made known to Transformers' Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoVideoProcessor,
)

from .configuration_mambamia import MambaMiaCompressorConfig, MambaMiaConfig
from .frame_selection import select_frames
from .modeling_compressor import MambaMiaCompressor
from .modeling_encoder import MambaMiaEncoder
from .modeling_mambamia import MambaMiaForConditionalGeneration, MambaMiaModel
from .processing_mambamia import MambaMiaProcessor
from .video_memory import VideoMemory
from .video_processing_mambamia import MambaMiaVideoProcessor


AutoConfig.register("mambamia_compressor", MambaMiaCompressorConfig)
AutoConfig.register("mambamia", MambaMiaConfig)
AutoModel.register(MambaMiaCompressorConfig, MambaMiaCompressor)
AutoModel.register(MambaMiaConfig, MambaMiaModel)
AutoModelForImageTextToText.register(MambaMiaConfig, MambaMiaForConditionalGeneration)
AutoModelForMultimodalLM.register(MambaMiaConfig, MambaMiaForConditionalGeneration)
AutoProcessor.register(MambaMiaConfig, MambaMiaProcessor)
AutoVideoProcessor.register(MambaMiaConfig, MambaMiaVideoProcessor)

# What is saved carries its code, so that it loads with `trust_remote_code=True` where this package is not installed.
MambaMiaCompressorConfig.register_for_auto_class()
MambaMiaConfig.register_for_auto_class()
MambaMiaCompressor.register_for_auto_class("AutoModel")
MambaMiaModel.register_for_auto_class("AutoModel")
MambaMiaForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
MambaMiaProcessor.register_for_auto_class()
MambaMiaVideoProcessor.register_for_auto_class()


__all__ = [
    "MambaMiaCompressor",
    "MambaMiaCompressorConfig",
    "MambaMiaConfig",
    "MambaMiaEncoder",
    "MambaMiaForConditionalGeneration",
    "MambaMiaModel",
    "MambaMiaProcessor",
    "MambaMiaVideoProcessor",
    "VideoMemory",
    "select_frames",
]
