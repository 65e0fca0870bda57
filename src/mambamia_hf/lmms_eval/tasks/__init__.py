"""The task `mambamia_needle` of lmms-eval."""
