"""Arguments of the commands that compare snapshots (cli_diff.py)."""

import argparse
from collections.abc import Callable

from objstore.errors import InvalidRequest
from objstore.names import check_name, check_tag

Add = Callable[[argparse.ArgumentParser], None]


def add_diffs(
    add: Callable[[str, str], argparse.ArgumentParser],
    common: Add,
    force: Add,
    convert: Callable[[Callable[[str], tuple[str, str]]], Callable[[str], tuple[str, str]]],
) -> None:
    """`vdi diff`."""
    diff = add("diff", "show what has changed since a snapshot, or between two")
    diff.add_argument("range", metavar="NAME@TAG[..[TAG]]", type=convert(compared))
    common(diff)
    force(diff)


def compared(text: str) -> tuple[str, str]:
    """What is compared: DISK@FROM or DISK@FROM.. with the disk as it is, DISK@FROM..TO with its snapshot TO,
    DISK@FROM..OTHER@TO with another one's. InvalidRequest."""
    found = [
        pair for at in range(len(text)) if text.startswith("..", at) and (pair := _pair(text[:at], text[at + 2 :]))
    ]
    if not found and (pair := _pair(text, "")):
        found = [pair]
    if len(found) != 1:
        raise InvalidRequest(f"{text!r} is not NAME@FROM..TO, NAME@FROM..NAME@TO or NAME@FROM")
    return found[0]


def _pair(older: str, newer: str) -> tuple[str, str] | None:
    if not _is_snapshot(older):
        return None
    disk = older.partition("@")[0]
    if not newer:
        return older, disk
    newer = newer if "@" in newer else f"{disk}@{newer}"
    return (older, newer) if _is_snapshot(newer) else None


def _is_snapshot(text: str) -> bool:
    name, _, which = text.partition("@")
    try:
        check_name(name)
        if not which.isdigit():
            check_tag(which)
    except InvalidRequest:
        return False
    return bool(which)
