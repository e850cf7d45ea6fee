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


class Member(msgspec.Struct, frozen=True):
    """A zone of a store: its number (never used again), identity (hex) and last known place."""

    number: int
    id: str
    path: str


class Superblock(msgspec.Struct, frozen=True, kw_only=True):
    """What a zone says about itself. features_*: names that a program must know to read, to write, to check."""

    store: str
    zone: str
    number: int
    members: list[Member]
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
    """A membership. One is written at every start; it is complete when all its members hold it."""

    number: int
    id: str
    parent: str
    members: list[int]
    w: int
    wall: float
    catalog: CatalogHead


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
    except msgspec.DecodeError as error:
        raise FormatError(f"{where} is damaged: {error}") from error
