"""MambaMia in vLLM: a plugin that vLLM finds by its entry point, see docs/vllm.md."""


def register() -> None:
    """Makes the model and its loader of videos known to vLLM, which calls this in each of its processes."""
    from vllm import ModelRegistry

    from .. import auto  # noqa: F401  # the Auto classes, so that no checkpoint needs `trust_remote_code`
    from . import video  # noqa: F401  # the loader

    name = "MambaMiaForConditionalGeneration"
    ModelRegistry.register_model(name, f"{__name__}.model:{name}")


__all__ = ["register"]
