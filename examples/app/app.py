"""The page of `mambamia web` as a Hugging Face Space."""

import os

from mambamia_hf import BUNDLED_CHECKPOINT
from mambamia_hf.web.server import serve


if __name__ == "__main__":
    is_space = "SPACE_ID" in os.environ
    serve(os.environ.get("MAMBAMIA_MODEL") or BUNDLED_CHECKPOINT, host="0.0.0.0" if is_space else "127.0.0.1")
