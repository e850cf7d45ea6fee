"""Exports: which volume a name means, and what a client is told about it.

Spec: proto.md, "Transmission flags", "Size constraints", "Metadata querying", `NBD_OPT_EXPORT_NAME` (the empty name).
INFO is answered from `VolumeSource.peek`, GO from the open volume, both through `transmission_flags`: the same
parameters give the same data.
"""

import itertools
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final

from nbdserver.access import Access, Right
from nbdserver.identity import Peer
from nbdserver.wire.constants import State, TransmissionFlag
from objstore.units import BLOCK_BYTES, MIB
from objstore.volume.base import Volume, VolumeInfo, VolumeSource

PAYLOAD_BYTES_ADVERTISED: Final = 32 * MIB
BLOCK_SIZES_BYTES: Final = (1, BLOCK_BYTES, PAYLOAD_BYTES_ADVERTISED)
"""Minimum, preferred, maximum payload: the defaults of the protocol, told to everybody."""

STATUS_EXTENTS_MAX: Final = 1 << 11
"""Extents in one answer to BLOCK_STATUS (32 KiB with extended headers). A client asks again behind the last one."""

ExtentQuery = Callable[[Volume, int, int, int], Awaitable[list[tuple[int, int]]]]
"""(volume, offset_bytes, length_bytes, extents_max) -> (length_bytes, status) of at least one extent."""


async def _allocation(volume: Volume, offset: int, length: int, extents_max: int) -> list[tuple[int, int]]:
    """base:allocation. What is not data reads as zeros; only a hole may meet ENOSPC when it is written."""
    hole = int(State.HOLE)
    zero = int(State.ZERO)
    found = await volume.extents(offset, length, extents_max=extents_max)
    return [(extent.length_bytes, hole * extent.hole | zero * extent.zero) for extent in found]


async def _depth(volume: Volume, offset: int, length: int, extents_max: int) -> list[tuple[int, int]]:
    """qemu:allocation-depth: 0 = not allocated, 1 = the volume's own, 2 = of what it is a clone of, and so on."""
    return await volume.depths(offset, length, extents_max=extents_max)


def _dirty(since: Volume) -> ExtentQuery:
    """qemu:dirty-bitmap:TAG: bit 0 = what is not as it was in `since`."""

    async def query(volume: Volume, offset: int, length: int, extents_max: int) -> list[tuple[int, int]]:
        joined: list[tuple[int, int]] = []
        for change in await volume.changed(since, offset, length, extents_max=extents_max):
            if joined and joined[-1][1] == change.changed:
                joined[-1] = joined[-1][0] + change.length_bytes, int(change.changed)
            else:
                joined.append((change.length_bytes, int(change.changed)))
        return joined

    return query


def _changed(since: Volume) -> ExtentQuery:
    """x-sheepfold:changed:TAG: bit 0 as above; with it bit 1 = reads as zeros now, bit 2 = is a hole now."""

    async def query(volume: Volume, offset: int, length: int, extents_max: int) -> list[tuple[int, int]]:
        found = await volume.changed(since, offset, length, extents_max=extents_max)
        return [(each.length_bytes, each.changed | each.zero << 1 | each.hole << 2) for each in found]

    return query


CONTEXTS: Final[Mapping[str, ExtentQuery]] = {"base:allocation": _allocation, "qemu:allocation-depth": _depth}
"""The metadata contexts that every export has; the id on the wire is the place here, counted from 1."""

SNAPSHOT_CONTEXTS: Final[Mapping[str, Callable[[Volume], ExtentQuery]]] = {
    "qemu:dirty-bitmap:": _dirty,
    "x-sheepfold:changed:": _changed,
}
"""Those that it has once for each of its snapshots, which are named behind these; ids behind those of CONTEXTS."""

SNAPSHOT_CONTEXTS_MAX: Final = 16
"""Of one connection: each keeps a snapshot open, and a request does its work for each."""


def snapshot_of(context: str) -> str | None:
    """The tag of the snapshot that a context compares with; None: it is none of those."""
    for prefix in SNAPSHOT_CONTEXTS:
        if context.startswith(prefix):
            return context.removeprefix(prefix)
    return None


def context_ids(names: Sequence[str]) -> list[int]:
    """Ids on the wire of the selected contexts."""
    fixed = list(CONTEXTS)
    following = itertools.count(len(fixed) + 1)
    return [fixed.index(name) + 1 if name in CONTEXTS else next(following) for name in names]


def query_of(context: str, snapshots: Mapping[str, Volume]) -> ExtentQuery:
    """What answers for a selected context. snapshots: those that are open, by their tags."""
    if context in CONTEXTS:
        return CONTEXTS[context]
    tag = snapshot_of(context)
    assert tag is not None
    return SNAPSHOT_CONTEXTS[context.removesuffix(tag)](snapshots[tag])


class Exports:
    """What there is, and the rules about it. Attributes change while clients are connected."""

    def __init__(
        self,
        source: VolumeSource,
        default: str | None = None,
        *,
        list_snapshots: bool = False,
        access: Access | None = None,
    ) -> None:
        self.source = source
        self.default = default
        self.list_snapshots = list_snapshots
        self.access = access or Access()


class View:
    """The names that one client may use. secure: its connection has TLS."""

    def __init__(self, exports: Exports, peer: Peer, *, secure: bool) -> None:
        self._exports = exports
        self._peer = peer
        self._secure = secure

    def right(self, name: str) -> Right:
        """What it may do with an export, by its real name."""
        return self._exports.access.of(name).right(self._peer, secure=self._secure)

    def names(self) -> list[str]:
        """What LIST shows: what there is at this moment."""
        return self._visible(self._exports.source.names(snapshots=self._exports.list_snapshots))

    def contexts(self, name: str) -> list[str]:
        """Every metadata context of an export, by its real name."""
        base = name.partition("@")[0]
        tags = [tag for tag in self._exports.source.tags(name) if self._sees(f"{base}@{tag}")]
        return [*CONTEXTS, *(prefix + tag for prefix in SNAPSHOT_CONTEXTS for tag in tags)]

    def describe(self, name: str) -> VolumeInfo | None:
        """The export that the client calls `name`; None = there is none, for this client.

        The empty name is the configured default, without one the only export; with none or several of them nothing.
        """
        source = self._exports.source
        wanted = name or self._exports.default
        if wanted is None:
            names = self._visible(source.names())
            wanted = names[0] if len(names) == 1 else ""
        found = source.peek(wanted) if wanted else None
        if found is None:
            return None
        right = self.right(found.name)
        if right is Right.NOTHING:
            return None
        if right is Right.SEE:
            return found._replace(refused=f"{self._peer.client} may see this export, not use it")
        return found._replace(read_only=True) if right is Right.READ else found

    def _sees(self, name: str) -> bool:
        return self.right(name) is not Right.NOTHING

    def _visible(self, names: list[str]) -> list[str]:
        return [name for name in names if self._sees(name)] if self._exports.access.rules else names


def transmission_flags(*, read_only: bool, chunked: bool, status_payload: bool) -> int:
    """What a connection may do with an export. Commands that would be refused anyway are not offered.

    chunked: structured replies or extended headers are in use.
    status_payload: extended headers are in use and metadata contexts are selected.
    """
    flags = (
        TransmissionFlag.HAS_FLAGS
        | TransmissionFlag.SEND_FLUSH
        | TransmissionFlag.SEND_FUA
        | TransmissionFlag.CAN_MULTI_CONN
        | TransmissionFlag.SEND_CACHE
    )
    if read_only:
        flags |= TransmissionFlag.READ_ONLY
    else:
        flags |= TransmissionFlag.SEND_TRIM | TransmissionFlag.SEND_WRITE_ZEROES | TransmissionFlag.SEND_FAST_ZERO
    if chunked:
        flags |= TransmissionFlag.SEND_DF
    if status_payload:
        flags |= TransmissionFlag.BLOCK_STATUS_PAYLOAD
    return int(flags)


def matching_contexts(query: str, names: Sequence[str], *, listing: bool) -> list[str]:
    """Which of these contexts a query names. An empty leaf is a wildcard in LIST_META_CONTEXT and nothing in
    SET_META_CONTEXT, at each level (`qemu:`, `qemu:dirty-bitmap:`); unknown namespaces and leaves match nothing."""
    if ":" not in query:
        query += ":"
    if query.endswith(":"):
        return [name for name in names if listing and name.startswith(query)]
    return [query] if query in names else []
