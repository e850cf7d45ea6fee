"""Documents: small JSON objects of a zone (superblock, epoch), one line of identity and CRC in front. FORMAT.md,
"Documents".

    SHEEPFOLD <kind> <format version> crc32c=<8 hex digits over the body>\\n
    <body: JSON>
"""

import re
from typing import Final, TypeVar

import msgspec
from crc32c import crc32c

from objstore.errors import FormatError, NewerFormat

T = TypeVar("T")
FORMAT_VERSION: Final = 1
_LINE: Final = re.compile(rb"SHEEPFOLD ([a-z]+) ([1-9][0-9]{0,8}) crc32c=([0-9a-f]{8})\n")


class Known(msgspec.Struct, frozen=True):
    """A zone that a superblock tells of: its number, identity (hex) and last known place."""

    number: int
    id: str
    path: str


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """A zone that takes part in an epoch. weight: its share of new data, relative to the others'. state: `in`, or
    `draining` (gets no new segments)."""

    number: int
    id: str
    path: str
    weight: float = 1.0
    state: str = "in"


class Outside(msgspec.Struct, frozen=True, kw_only=True):
    """A zone of the store that is no member of an epoch. since: number of the first epoch without it."""

    number: int
    id: str
    path: str
    weight: float
    state: str
    since: int
    reason: str


class Superblock(msgspec.Struct, frozen=True, kw_only=True):
    """What a zone says about itself. features_*: names that a program must know to read, to write, to check."""

    store: str
    zone: str
    number: int
    members: list[Known]
    created: float
    features_read: list[str] = []
    features_write: list[str] = []
    features_check: list[str] = []


class CatalogHead(msgspec.Struct, frozen=True, kw_only=True):
    """The committed head of the catalog's log: snapshot to start from, and which segments follow it."""

    snapshot: int
    generation: int
    first_number: int
    position: int
    previous_crc: int


class Epoch(msgspec.Struct, frozen=True, kw_only=True):
    """A membership (objstore/replica/epochs.py has the rules). start: written by an opening of the store, before it
    touched any data; else written by one that was open. next_zone: the lowest zone number that was never used.
    complete: every member held the record when this copy was written. forced: the administrator had it opened although
    zones were missing that may have held something newer."""

    number: int
    id: str
    parent: str
    members: list[Member]
    out: list[Outside]
    w: int
    wall: float
    start: bool
    catalog: CatalogHead
    next_zone: int
    complete: bool = False
    forced: bool = False


def encode_document(kind: str, body: msgspec.Struct) -> bytes:
    """The document's bytes."""
    data = msgspec.json.encode(body)
    return b"SHEEPFOLD %s %d crc32c=%08x\n" % (kind.encode(), FORMAT_VERSION, crc32c(data)) + data + b"\n"


def decode_document(kind: str, data: bytes, type_: type[T], where: str) -> T:
    """The body. FormatError: not such a document, damaged, or of a newer format (both versions are named)."""
    match = _LINE.match(data)
    if match is None or match[1] != kind.encode():
        raise FormatError(f"{where} is no {kind} of Sheepfold")
    if int(match[2]) > FORMAT_VERSION:
        raise NewerFormat(
            f"{where} has format version {int(match[2])}, this program knows up to {FORMAT_VERSION}: "
            "use a newer program"
        )
    body = data[match.end() : -1]
    if crc32c(body) != int(match[3], 16):
        raise FormatError(f"{where} is damaged: its checksum is wrong")
    try:
        return msgspec.json.decode(body, type=type_)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FormatError(f"{where} is damaged: {error}") from error
