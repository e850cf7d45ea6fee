"""Version of the program: the only place that knows it (pyproject.toml reads it from here)."""

from typing import Final

VERSION: Final = "0.1.0"
