"""What things may be called: VDIs, snapshots' tags, paths, numbered objects of a zone."""

import re
import unicodedata
from typing import Final

from objstore.errors import InvalidRequest

NAME_BYTES_MAX: Final = 200
ATTRIBUTE_BYTES_MAX: Final = 256

_NUMBERED: Final = re.compile(r"/([0-9a-f]{8})\Z")
_RESERVED: Final = "/@:"
"""Path separator, tag separator (disk@tag) and the separator of NAME:SIZE on the command line."""
_NEVER: Final = frozenset({"Cc", "Cs", "Zl", "Zp"})
"""Unicode categories that have no place in one line of UTF-8: controls, surrogates, line and paragraph separators."""


def check_name(name: str, what: str = "VDI name") -> None:
    """InvalidRequest, naming the offender, unless `name` is 1-200 bytes of UTF-8 without control character, "/", "@",
    ":" and without a leading "-" or "."."""
    if not name:
        raise InvalidRequest(f"a {what} must not be empty")
    for character in name:
        if character in _RESERVED or unicodedata.category(character) in _NEVER:
            raise InvalidRequest(f"{what} {_quoted(name)} contains {character!a}, which no name may")
    if name[0] in "-.":
        raise InvalidRequest(f"{what} {_quoted(name)} begins with {name[0]!r}, which no name may")
    length_bytes = len(name.encode())
    if length_bytes > NAME_BYTES_MAX:
        raise InvalidRequest(
            f"{what} {_quoted(name)} has {length_bytes} bytes of UTF-8; at most {NAME_BYTES_MAX} are allowed"
        )


def check_tag(tag: str) -> None:
    """InvalidRequest unless a snapshot can have this tag: as names of VDIs, and not digits alone, which would be an
    index; "" = none."""
    if tag:
        check_name(tag, "tag")
    if tag.isdigit():
        raise InvalidRequest(f"tag {_quoted(tag)} is a number, which would be taken for an index")


def check_attribute(name: str) -> None:
    """InvalidRequest, naming the offender, unless an attribute can have this name: 1-256 bytes of UTF-8 without control
    characters."""
    length_bytes = len(name.encode(errors="surrogatepass"))
    if not 1 <= length_bytes <= ATTRIBUTE_BYTES_MAX:
        raise InvalidRequest(f"attribute name {_quoted(name)} has {length_bytes} bytes of UTF-8, not 1 to 256")
    for character in name:
        if unicodedata.category(character) in _NEVER:
            raise InvalidRequest(f"attribute name {_quoted(name)} contains {character!a}, which no name may")


def check_path(path: str, what: str) -> None:
    """InvalidRequest, naming `what` it is for, unless a file can have this name and a message or a note can tell it."""
    if not path:
        raise InvalidRequest(f"{what}: the path is empty")
    for character in path:
        if character == "\0" or unicodedata.category(character) == "Cs":
            raise InvalidRequest(f"{what} {path!a}: a path is UTF-8 without NUL characters")


def object_number(name: str) -> int | None:
    """The number that an object's name ends with, None if it is none of ours."""
    match = _NUMBERED.search(name)
    return int(match[1], 16) if match else None


def _quoted(name: str) -> str:
    """The name in quotes, cut to what an error line can carry, control characters escaped."""
    return repr(name if len(name) <= 40 else name[:37] + "...")
