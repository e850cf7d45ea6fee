"""Object names of a zone: relative paths of 1-8 parts of [a-z0-9._-], in the grammar of `objstore.backend.base`."""

import re
from typing import Final

from objstore.errors import InvalidRequest

NAME_BYTES_MAX: Final = 200
NAME_PARTS_MAX: Final = 8

_NAME: Final = re.compile(rf"(?!\.\.?(?:/|$))[a-z0-9._-]+(?:/(?!\.\.?(?:/|$))[a-z0-9._-]+){{0,{NAME_PARTS_MAX - 1}}}")


def is_name(name: str) -> bool:
    """Whether `name` may name an object."""
    return len(name) <= NAME_BYTES_MAX and _NAME.fullmatch(name) is not None


def check_name(name: str) -> None:
    """InvalidRequest unless `name` may name an object."""
    if not is_name(name):
        raise InvalidRequest(f"not an object name: name={name!r}")


def folder_of(name: str) -> str:
    """The folder that holds the object, "" for the zone's own."""
    return name.rpartition("/")[0]


def prefix_of(prefix: str) -> str:
    """The folder that a list prefix means, without its closing slash; "" is everything. InvalidRequest if malformed."""
    folder = prefix.removesuffix("/")
    if folder:
        check_name(folder)
    elif prefix:
        raise InvalidRequest(f"not a folder: prefix={prefix!r}")
    return folder
