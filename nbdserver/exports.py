"""Exports: which volume a name means, and what a client is told about it.

Spec: proto.md, "Transmission flags", "Size constraints", "Metadata querying", `NBD_OPT_EXPORT_NAME` (the empty name).
INFO is answered from `VolumeSource.peek`, GO from the open volume, both through `transmission_flags`: the same
parameters give the same data.
"""

from collections.abc import Awaitable, Callable, Mapping
from typing import Final

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


CONTEXTS: Final[Mapping[str, ExtentQuery]] = {"base:allocation": _allocation}
"""Every metadata context by name; its id on the wire is its place here, counted from 1."""

CONTEXT_IDS: Final[Mapping[str, int]] = {name: index for index, name in enumerate(CONTEXTS, start=1)}


class Exports:
    """The names that clients may use."""

    def __init__(self, source: VolumeSource, default: str | None = None, *, list_snapshots: bool = False) -> None:
        self.source = source
        self.default = default
        self.list_snapshots = list_snapshots

    def names(self) -> list[str]:
        """What LIST shows: what there is at this moment."""
        return self.source.names(snapshots=self.list_snapshots)

    def describe(self, name: str) -> VolumeInfo | None:
        """The export that a client calls `name`; None = there is none.

        The empty name is the configured default, without one the only export; with none or several of them nothing.
        """
        if name:
            return self.source.peek(name)
        if self.default is not None:
            return self.source.peek(self.default)
        names = self.source.names()
        return self.source.peek(names[0]) if len(names) == 1 else None


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


def matching_contexts(query: str, *, listing: bool) -> list[str]:
    """Contexts that a query names. An empty leaf is a wildcard in LIST_META_CONTEXT and nothing in SET_META_CONTEXT;
    unknown namespaces and leaves match nothing."""
    namespace, _, leaf = query.partition(":")
    if not leaf:
        return [name for name in CONTEXTS if listing and name.startswith(f"{namespace}:")]
    return [query] if query in CONTEXTS else []
