"""How `attach` and `detach` fail."""

from typing import Final

GAVE_UP: Final = 1
USAGE: Final = 2
NOT_FOUND: Final = 3
IN_USE: Final = 5
UNAVAILABLE: Final = 7


class AttachError(Exception):
    """The message is for people. code: exit code of the command (README.md, "Exit codes")."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code
