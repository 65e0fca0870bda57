"""For `LMMS_EVAL_PLUGINS=mambamia_hf.lmms_eval`, which takes no chat models: the model has an entry point instead."""

AVAILABLE_MODELS: dict[str, str] = {}
