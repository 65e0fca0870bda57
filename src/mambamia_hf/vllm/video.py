"""vLLM's loader of videos: it reads nothing, so that the checkpoint's own video processor does."""

from typing import Any

import numpy as np
from vllm.multimodal.video import VIDEO_LOADER_REGISTRY, VideoLoader


# The numbers of frames that vLLM passes where nobody asked for any.
_NOT_ASKED_FOR = (-1, 32)


@VIDEO_LOADER_REGISTRY.register("mambamia", video_processor="MambaMiaVideoProcessor")
class MambaMiaVideoLoader(VideoLoader):
    """Hands files over as they are.

    Which frames to decode, and how large, is up to the settings of the checkpoint and the options of the request. A
    loader knows neither; and of a video that vLLM has cached, nothing is decoded again.
    """

    @classmethod
    def load_bytes(cls, data: bytes, num_frames: int = -1, **kwargs: Any) -> tuple[np.ndarray, dict[str, Any]]:
        """The content of a video file in the place of its frames.

        Args:
            data: the file.
            num_frames: as vLLM passes it.
            kwargs: other settings of `--media-io-kwargs`.

        Returns:
            The bytes `(num_bytes,)`, uint8, and what tells them from frames.

        Raises:
            ValueError: for settings of sampling, which belong to the processor here.
        """
        if num_frames not in _NOT_ASKED_FOR or kwargs:
            asked = {"num_frames": num_frames, **kwargs}
            raise ValueError(
                f"The frames of videos are sampled as the checkpoint says, and media_io_kwargs asks for {asked}: use "
                f'mm_processor_kwargs in its place, such as {{"max_frames": 64}} or {{"fps": 1}}.'
            )
        return np.frombuffer(data, np.uint8), {"is_file": True}


__all__ = ["MambaMiaVideoLoader"]
