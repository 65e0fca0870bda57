"""Transformers' own common tests for configurations, models and processors, run against this package's classes."""

import copy
import shutil
import tempfile
import unittest
from pathlib import Path

import torch
from PIL import Image
from tiny import tiny_tokenizer
from tiny_model import (
    COMPRESSOR_CONFIG,
    IMAGE_SIZE,
    NUM_ANCHORS,
    TEXT_CONFIG,
    VISION_CONFIG,
    VOCAB_SIZE,
    prompt,
    random_videos,
    tiny_config,
)
from transformers import SiglipImageProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, MODEL_MAPPING_NAMES
from transformers.testing_utils import torch_device
from transformers_tests import use_transformers_tests
from video_files import write_video

from mambamia_hf import (
    MambaMiaCompressor,
    MambaMiaCompressorConfig,
    MambaMiaConfig,
    MambaMiaForConditionalGeneration,
    MambaMiaModel,
    MambaMiaProcessor,
    MambaMiaVideoProcessor,
)


use_transformers_tests()

# The processors' tests take these files from the Hub; here they are written by `MambaMiaProcessorTest.setUpClass`.
import fetch_hub_objects_for_ci  # noqa: E402


MEDIA = Path(tempfile.mkdtemp())
VIDEOS = ("big_buck_bunny_320x240_10s.mp4", "sample_demo_1_320x240.mp4", "tiny_video_320x240.mp4")
IMAGES = ("coco_sample.png", "australia.jpg")
SOUNDS = ("glass-breaking-151256.mp3", "f2641_0_throatclearing.wav")  # named, but not used
fetch_hub_objects_for_ci.LOCAL_FILES.update({name: str(MEDIA / name) for name in VIDEOS + IMAGES + SOUNDS})

from tests.generation.test_utils import GenerationTesterMixin  # noqa: E402
from tests.test_configuration_common import ConfigTester  # noqa: E402
from tests.test_modeling_common import ModelTesterMixin  # noqa: E402
from tests.test_processing_common import MODALITY_INPUT_DATA, ProcessorTesterMixin  # noqa: E402
from tests.test_video_processing_common import VideoProcessingTestMixin, prepare_video_inputs  # noqa: E402


# The common tests tell a head from a base model by these tables.
MODEL_MAPPING_NAMES.update(mambamia="MambaMiaModel", mambamia_compressor="MambaMiaCompressor")
MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.update(mambamia="MambaMiaForConditionalGeneration")


class MambaMiaTester:
    """Two prompts of an image and a video each, as the common tests ask for them."""

    num_frames = 3
    batch_size = 2
    is_training = True
    vision_config = VISION_CONFIG
    text_config = TEXT_CONFIG
    num_hidden_layers = TEXT_CONFIG["num_hidden_layers"]
    hidden_size = TEXT_CONFIG["hidden_size"]
    num_attention_heads = TEXT_CONFIG["num_attention_heads"]
    vocab_size = VOCAB_SIZE
    placeholders: dict[str, int] = {}

    def __init__(self, parent: unittest.TestCase):
        self.parent = parent
        self.input_ids = prompt([5, 6], "image", [7], self.num_frames, [8, 9, 10]).repeat(self.batch_size, 1)
        self.seq_length = self.encoder_seq_length = self.input_ids.shape[1]

    def get_config(self) -> MambaMiaConfig:
        return tiny_config(**self.placeholders)

    def prepare_config_and_inputs_for_common(self) -> tuple[MambaMiaConfig, dict[str, torch.Tensor]]:
        inputs = {
            "input_ids": self.input_ids,
            "attention_mask": torch.ones_like(self.input_ids),
            "pixel_values": random_videos(1, self.batch_size, seed=1)[0],
            "pixel_values_videos": random_videos(self.batch_size, self.num_frames, seed=2),
        }
        return self.get_config(), {name: tensor.to(torch_device) for name, tensor in inputs.items()}


class MambaMiaModelTest(ModelTesterMixin, GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (MambaMiaModel, MambaMiaForConditionalGeneration)
    _is_composite = True
    # The layers above `vision_feature_layer` take no part in the loss.
    test_all_params_have_gradient = False
    # Features come out as wide as the language model, not as the vision tower.
    skip_test_image_features_output_shape = True
    skip_test_video_features_output_shape = True

    def setUp(self):
        self.model_tester = MambaMiaTester(self)
        if "eager_matches_sdpa" in self._testMethodName or "rope_scaling" in self._testMethodName:
            # These make up `input_ids` and pass no media, so no id of the vocabulary may be a placeholder.
            self.model_tester.placeholders = {"image_token_id": VOCAB_SIZE, "video_token_id": VOCAB_SIZE + 1}
        self.config_tester = ConfigTester(self, config_class=MambaMiaConfig, has_text_modality=False)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = copy.deepcopy(inputs_dict)
        if return_labels and model_class is MambaMiaForConditionalGeneration:
            inputs["labels"] = inputs["input_ids"].clone()
        return inputs

    def test_config(self):
        self.config_tester.run_common_tests()

    @unittest.skip(
        "Transformers passes over modules without weights of their own where the model's code is not its own, and "
        "SigLIP's initialise those below them; MambaMiaCompressorTest runs it for the weights of this package"
    )
    def test_can_init_all_missing_weights(self):
        pass

    @unittest.skip("the old names of the cache are taken without a warning; test_modeling_mambamia tries all of them")
    def test_bc_cache_name_forward(self):
        pass

    @unittest.skip("it subtracts outputs, which `keep_mask` does not allow; test_modeling_mambamia has its own")
    def test_model_outputs_equivalence(self):
        pass


class MambaMiaCompressorTester:
    batch_size = 2
    num_frames = 3
    is_training = True
    num_hidden_layers = COMPRESSOR_CONFIG["num_hidden_layers"]
    hidden_size = COMPRESSOR_CONFIG["hidden_size"]

    def __init__(self, parent: unittest.TestCase):
        self.parent = parent

    def get_config(self) -> MambaMiaCompressorConfig:
        return MambaMiaCompressorConfig(input_size=12, output_size=20, **COMPRESSOR_CONFIG)

    def prepare_config_and_inputs_for_common(self) -> tuple[MambaMiaCompressorConfig, dict[str, torch.Tensor]]:
        generator = torch.Generator().manual_seed(0)
        features = torch.randn(self.batch_size, self.num_frames, 8, 12, generator=generator)
        return self.get_config(), {"patch_features": features.to(torch_device)}


class MambaMiaCompressorTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (MambaMiaCompressor,)
    has_attentions = False
    test_can_init_all_missing_weights_before_2023 = True  # the test looks for the year in a file's licence header
    test_resize_embeddings = False

    def setUp(self):
        self.model_tester = MambaMiaCompressorTester(self)
        self.config_tester = ConfigTester(
            self,
            config_class=MambaMiaCompressorConfig,
            has_text_modality=False,
            common_properties=["hidden_size", "num_hidden_layers", "input_size", "output_size"],
        )

    def test_config(self):
        self.config_tester.run_common_tests()

    @unittest.skip("features come in and anchors go out: there are no token embeddings")
    def test_model_get_set_embeddings(self):
        pass

    @unittest.skip("hidden states of the two stages differ in layout and are not returned")
    def test_hidden_states_output(self):
        pass

    @unittest.skip("hidden states of the two stages differ in layout and are not returned")
    def test_retain_grad_hidden_states_attentions(self):
        pass

    @unittest.skip("it asks for hidden states, which are not returned; test_modeling_compressor has its own")
    def test_model_outputs_equivalence(self):
        pass


class MambaMiaVideoProcessingTester:
    batch_size = 2
    num_frames = 8
    num_channels = 3

    def prepare_video_inputs(self, equal_resolution: bool = False, return_tensors: str = "pil") -> list:
        return prepare_video_inputs(
            batch_size=self.batch_size,
            num_frames=self.num_frames,
            num_channels=self.num_channels,
            min_resolution=30,
            max_resolution=80,
            equal_resolution=equal_resolution,
            return_tensors=return_tensors,
        )

    def expected_output_video_shape(self, videos: list) -> tuple[int, ...]:
        return self.num_frames, self.num_channels, 18, 18


class MambaMiaVideoProcessingTest(VideoProcessingTestMixin, unittest.TestCase):
    fast_video_processing_class = MambaMiaVideoProcessor
    test_cast_dtype = True

    def setUp(self):
        super().setUp()
        self.video_processor_tester = MambaMiaVideoProcessingTester()
        self.video_processor_dict = {
            "do_resize": True,
            "size": {"height": 20, "width": 20},
            "do_center_crop": True,
            "crop_size": {"height": 18, "width": 18},
            "do_normalize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "do_convert_rgb": True,
        }

    def test_video_processor_from_dict_with_kwargs(self):
        video_processor = MambaMiaVideoProcessor.from_dict(self.video_processor_dict)
        self.assertEqual(video_processor.size, {"height": 20, "width": 20})
        self.assertEqual(video_processor.crop_size, {"height": 18, "width": 18})
        # Other than in the common test, one number is a square: the vision tower takes one shape only.
        video_processor = MambaMiaVideoProcessor.from_dict(self.video_processor_dict, size=42, crop_size=84)
        self.assertEqual(video_processor.size, {"height": 42, "width": 42})
        self.assertEqual(video_processor.crop_size, {"height": 84, "width": 84})


class MambaMiaProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = MambaMiaProcessor

    @classmethod
    def setUpClass(cls):
        MEDIA.mkdir(exist_ok=True)
        for name in VIDEOS:
            write_video(MEDIA / name, num_frames=11, fps=30)
        for name in IMAGES:
            Image.effect_noise((40, 30), 64).convert("RGB").save(MEDIA / name)
        # A class that carries its code adds where to find it to what is saved, which these tests do not expect.
        cls.auto_classes = {part: part._auto_class for part in (MambaMiaProcessor, MambaMiaVideoProcessor)}
        for part in cls.auto_classes:
            part._auto_class = None
        super().setUpClass()

    @classmethod
    def tearDownClass(cls):
        super().tearDownClass()
        for part, auto_class in cls.auto_classes.items():
            part._auto_class = auto_class
        shutil.rmtree(MEDIA)

    @classmethod
    def _setup_tokenizer(cls):
        return tiny_tokenizer()

    @classmethod
    def _setup_image_processor(cls):
        return SiglipImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})

    @classmethod
    def _setup_video_processor(cls):
        return MambaMiaVideoProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})

    @staticmethod
    def prepare_processor_dict() -> dict:
        return {"tokens_per_frame": NUM_ANCHORS}

    def test_apply_chat_template_video_frame_sampling(self):
        # As the common test, but for two things: up to 2 fps are sampled where nothing is said, and a list of image
        # files may be sampled like any list of images, which Transformers' own processors refuse.
        processor = self.get_processor()

        def num_frames(video: str | list[str], **kwargs) -> int:
            messages = [{"role": "user", "content": [{"type": "video", "url": video}]}]
            inputs = processor.apply_chat_template(
                messages, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs=kwargs
            )
            return inputs["pixel_values_videos"].shape[1]

        for expected in self.video_sampling_expectations[:-1]:
            settings = {key: expected[key] for key in ("num_frames", "fps", "do_sample_frames") if key in expected}
            self.assertEqual(num_frames(str(MEDIA / VIDEOS[2]), **settings), expected["output_length"])
        self.assertEqual(num_frames(str(MEDIA / VIDEOS[2])), 1)
        images = [str(MEDIA / IMAGES[1])] * 2
        self.assertEqual(num_frames(images, do_sample_frames=False), 2)
        self.assertEqual(num_frames(images, do_sample_frames=True, num_frames=1), 1)

    # The common tests decode with torchcodec and are skipped without it; PyAV is always there.
    def test_apply_chat_template_video_0(self):
        self._test_apply_chat_template(
            "video", 1, "pt", "videos_input_name", "video_processor", MODALITY_INPUT_DATA["videos"]
        )

    def test_apply_chat_template_video_1(self):
        self._test_apply_chat_template(
            "video", 2, "pt", "videos_input_name", "video_processor", MODALITY_INPUT_DATA["videos"]
        )

    def test_apply_chat_template_decoded_video_0(self):
        videos = [self.prepare_videos_inputs()]
        self._test_apply_chat_template("video", 1, "pt", "videos_input_name", "video_processor", videos)

    @unittest.skip(
        "keep_frames and keep_ratio are a default that is saved with the processor and an argument of a call, a case "
        "that the test's own docstring leaves open"
    )
    def test_init_arguments_not_in_processor_kwargs(self):
        pass
