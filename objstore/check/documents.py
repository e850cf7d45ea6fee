"""Superblocks, epoch records and scrub notes: one line, a JSON object, a newline (FORMAT.md, Documents)."""

import re
from typing import Any, Final, NamedTuple

import msgspec
from crc32c import crc32c

from objstore.check.layout import VERSION, Damaged
from objstore.errors import NewerFormat

DOCUMENT_BYTES_MAX: Final = 1 << 20
"""Longer ones are not looked at; 64 zones with long paths take a few ten KiB."""

_LINE: Final = re.compile(rb"SHEEPFOLD ([a-z]+) ([1-9][0-9]{0,8}) crc32c=([0-9a-f]{8})\n")
_HEX_32: Final = re.compile("[0-9a-f]{32}", re.ASCII)


def document(data: bytes, kind: str) -> dict[str, Any]:
    """The JSON object of a document. NewerFormat: of a later version than this reader's."""
    line = _LINE.match(data)
    if line is None or line[1] != kind.encode():
        raise Damaged(f"the first line is not that of a document of kind {kind}")
    if int(line[2]) > VERSION:
        raise NewerFormat(f"{kind} of format version {int(line[2])}; this program knows version {VERSION}")
    text = data[line.end() :]
    if not text.endswith(b"\n") or crc32c(text[:-1]) != int(line[3], 16):
        raise Damaged("the document has a wrong checksum")
    try:
        value = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Damaged("the document is no JSON") from error
    if not isinstance(value, dict):
        raise Damaged("the document is no JSON object")
    return value


def member(fields: dict[str, Any], name: str, kind: type) -> Any:
    """A member of a JSON or msgpack object that must be there and of that type."""
    value: Any = fields.get(name)
    fits = type(value) is int and value >= 0 if kind is int else isinstance(value, kind)
    if not fits:
        raise Damaged(f"{name} is {value!r}")
    return value


def identity(fields: dict[str, Any], name: str) -> bytes:
    """A member of 32 hex digits."""
    text = member(fields, name, str)
    if not _HEX_32.fullmatch(text):
        raise Damaged(f"{name} is {text!r}")
    return bytes.fromhex(text)


class ZoneName(NamedTuple):
    """A zone as a member list names it."""

    number: int
    id: bytes
    path: str


class Superblock(NamedTuple):
    store: bytes
    zone: bytes
    number: int
    members: tuple[ZoneName, ...]
    """Where to look for the others; who belongs to the store is for the epoch to say."""


FEATURES_KNOWN: Final = frozenset({"membership"})


def superblock(data: bytes) -> Superblock:
    """NewerFormat: it needs features to be read or checked that this program doesn't know."""
    fields = document(data, "superblock")
    for use in ("features_read", "features_check"):
        unknown = sorted(set(map(str, member(fields, use, list))) - FEATURES_KNOWN)
        if unknown:
            raise NewerFormat(f"the store needs {', '.join(unknown)} ({use}), which this program does not know")
    zones = tuple(zone_name(entry) for entry in member(fields, "members", list))
    return Superblock(identity(fields, "store"), identity(fields, "zone"), member(fields, "number", int), zones)


def zone_name(entry: object) -> ZoneName:
    """One entry of a member list."""
    if not isinstance(entry, dict):
        raise Damaged(f"a member is {entry!r}")
    number = member(entry, "number", int)
    if number > 63:
        raise Damaged(f"a member has number {number}")
    return ZoneName(number, identity(entry, "id"), member(entry, "path", str))


class CatalogHead(NamedTuple):
    snapshot: int
    generation: int
    first_number: int
    position: int
    previous_crc: int


class Member(NamedTuple):
    """A zone as an epoch names it. placing: it gets new segments and checkpoints. reason: why it is out."""

    number: int
    id: bytes
    path: str
    placing: bool
    reason: str


class Epoch(NamedTuple):
    """An epoch record. complete: this copy says that every member held it."""

    number: int
    id: bytes
    parent: bytes
    members: tuple[Member, ...]
    out: tuple[Member, ...]
    w: int
    start: bool
    complete: bool
    forced: bool
    catalog: CatalogHead

    @property
    def ids(self) -> frozenset[bytes]:
        """Identities of its members."""
        return frozenset(zone.id for zone in self.members)


def epoch(data: bytes, number: int) -> Epoch:
    """The epoch record of that number."""
    fields = document(data, "epoch")
    if member(fields, "number", int) != number or not number:
        raise Damaged(f"the epoch record says number {fields['number']}")
    members = tuple(_member(entry) for entry in member(fields, "members", list))
    out = tuple(_member(entry) for entry in member(fields, "out", list))
    zones = (*members, *out)
    if (
        not members
        or len({zone.number for zone in zones}) < len(zones)
        or len({zone.id for zone in zones}) < len(zones)
    ):
        raise Damaged("the epoch record has no members, or names a zone twice")
    w = member(fields, "w", int)
    if not 1 <= w <= len(members):
        raise Damaged(f"w is {w}, with {len(members)} members")
    head = member(fields, "catalog", dict)
    catalog = CatalogHead(*(member(head, name, int) for name in CatalogHead._fields))
    start, complete, forced = (member(fields, name, bool) is True for name in ("start", "complete", "forced"))
    own, parent = identity(fields, "id"), identity(fields, "parent")
    return Epoch(number, own, parent, members, out, w, start, complete, forced, catalog)


def _member(entry: object) -> Member:
    name = zone_name(entry)
    assert isinstance(entry, dict)
    state = member(entry, "state", str)
    if state not in ("in", "draining"):
        raise Damaged(f"a member's state is {state!r}")
    weight = entry.get("weight")
    if not isinstance(weight, int | float) or weight <= 0:
        raise Damaged(f"a member's weight is {weight!r}")
    return Member(*name, state == "in", str(entry.get("reason", "")))


def hint(data: bytes, kind: str) -> None:
    """Check the note of a scrub or a recovery. What it says is for those alone."""
    fields = document(data, kind)
    if kind == "recovery":
        for entry in member(fields, "zones", list):
            if not isinstance(entry, list) or len(entry) != 3 or not _HEX_32.fullmatch(str(entry[0])):
                raise Damaged(f"zones has {entry!r}")
        return
    for name in ("started", "finished"):
        if not isinstance(fields.get(name), int | float):
            raise Damaged(f"{name} is {fields.get(name)!r}")
    for name in ("log", "segment"):
        member(fields, name, int)
