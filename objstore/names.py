"""What a VDI (or, later, a snapshot's tag) may be called."""

import unicodedata
from typing import Final

from objstore.errors import InvalidRequest

NAME_BYTES_MAX: Final = 200

_RESERVED: Final = "/@:"
"""Path separator, tag separator (disk@tag) and the separator of NAME:SIZE on the command line."""
_NEVER: Final = frozenset({"Cc", "Cs", "Zl", "Zp"})
"""Unicode categories that have no place in one line of UTF-8: controls, surrogates, line and paragraph separators."""


def check_name(name: str) -> None:
    """InvalidRequest, naming the offender, unless `name` is 1-200 bytes of UTF-8 without control character, "/", "@",
    ":" and without a leading "-" or "."."""
    if not name:
        raise InvalidRequest("a VDI name must not be empty")
    for character in name:
        if character in _RESERVED or unicodedata.category(character) in _NEVER:
            raise InvalidRequest(f"VDI name {_quoted(name)} contains {character!a}, which no name may")
    if name[0] in "-.":
        raise InvalidRequest(f"VDI name {_quoted(name)} begins with {name[0]!r}, which no name may")
    length_bytes = len(name.encode())
    if length_bytes > NAME_BYTES_MAX:
        raise InvalidRequest(
            f"VDI name {_quoted(name)} has {length_bytes} bytes of UTF-8; at most {NAME_BYTES_MAX} are allowed"
        )


def _quoted(name: str) -> str:
    """The name in quotes, cut to what an error line can carry, control characters escaped."""
    return repr(name if len(name) <= 40 else name[:37] + "...")
