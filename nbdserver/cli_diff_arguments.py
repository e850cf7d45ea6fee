"""Arguments of the commands that compare snapshots (cli_diff.py)."""

import argparse
from collections.abc import Callable
from typing import Protocol, TypeVar

from objstore.errors import InvalidRequest
from objstore.names import check_name, check_tag

Add = Callable[[argparse.ArgumentParser], None]
T = TypeVar("T")


class Convert(Protocol):
    """Makes the type of an argument of what may raise InvalidRequest."""

    def __call__(self, convert: Callable[[str], T], /) -> Callable[[str], T]: ...


def add_diffs(
    add: Callable[[str, str], argparse.ArgumentParser],
    common: Add,
    force: Add,
    convert: Convert,
) -> None:
    """`vdi diff|export-diff|import-diff`."""
    diff = add("diff", "show what has changed since a snapshot, or between two")
    diff.add_argument("range", metavar="NAME@TAG[..[TAG]]", type=convert(compared))
    export = add("export-diff", "write what turns one snapshot into another to stdout or a file")
    export.add_argument("range", metavar="[NAME@TAG]..TAG", type=convert(exported))
    importing = add("import-diff", "put what export-diff wrote on a disk, and take the snapshot that it is of")
    for parser in (export, importing):
        parser.add_argument("file", metavar="FILE", nargs="?", default="-", help="-: the standard stream")
    importing.add_argument("--name", metavar="NAME", type=convert(_vdi_name), help="the disk (default: as exported)")
    importing.add_argument("--tag", metavar="TAG", type=convert(_tag), help="of the snapshot (default: as exported)")
    for parser in (diff, export, importing):
        common(parser)
        force(parser)


def _vdi_name(text: str) -> str:
    check_name(text)
    return text


def _tag(text: str) -> str:
    check_tag(text)
    return text


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


def exported(text: str) -> tuple[str, str]:
    """What is exported: as `compared`, but two snapshots; ..DISK@TO: a whole one. InvalidRequest."""
    if text.startswith("..") and _is_snapshot(text[2:]):
        return "", text[2:]
    older, newer = compared(text)
    if "@" not in newer:
        raise InvalidRequest(f"{text!r} names no snapshot to export: NAME@FROM..TO, or ..NAME@TO for all of it")
    return older, newer


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
