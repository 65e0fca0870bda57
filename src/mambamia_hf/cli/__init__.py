"""The program `mambamia`.

Importing it is cheap: whatever takes long to import is imported inside the functions that need it, so that `--help`
and wrong arguments are answered at once.
"""

from .main import main


__all__ = ["main"]
