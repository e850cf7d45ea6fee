"""A connection to a store: what can be asked of it, in this process and behind a server alike."""

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping, Sequence

from objstore.access import export
from objstore.access.export import Pieces
from objstore.access.handle import VdiHandle
from objstore.access.pending import Pending
from objstore.format.stream import Begin
from objstore.volume.settings import MODES
from objstore.volume.status import (
    JobStatus,
    RecoveryStatus,
    ScrubStatus,
    SnapshotSpace,
    SnapshotStatus,
    SnapshotTaken,
    StoreStatus,
    TrashStatus,
    VdiDamage,
    VdiStatus,
    ZoneStatus,
)


class Connection(ABC):
    """A store. Close it in the end, or use it as a context manager; its handles are closed with it.

    Methods raise the errors of objstore.errors: NotFound (no such VDI), Exists, Busy (in use), InvalidRequest, NoSpace,
    Unavailable (zones or the server failed), Stopping (the store is closing).
    """

    in_process: bool
    """Whether the store is in this process: its own work ends with the connection."""

    async def __aenter__(self) -> "Connection":
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.close()

    # -- VDIs ---------------------------------------------------------------------------------------------------

    def open(self, name: str, *, read_only: bool = False) -> Pending[VdiHandle]:
        """Open a VDI: `await connection.open(name)` or `async with connection.open(name) as vdi`."""
        return Pending(lambda: self._open(name, read_only))

    @abstractmethod
    async def create(
        self, name: str, size_bytes: int, *, copies: int | None = None, mode: str = MODES[0], prealloc: bool = False
    ) -> VdiStatus:
        """Create a VDI; durable on return. copies: default the smaller of 3 and the number of zones. mode: when writes
        are acknowledged. prealloc: its space is set aside."""

    @abstractmethod
    def vdis(self) -> AsyncIterator[VdiStatus]:
        """Every VDI, by name."""

    @abstractmethod
    async def info(self, name: str) -> VdiStatus:
        """One VDI."""

    @abstractmethod
    async def delete(self, name: str) -> None:
        """Delete a VDI; its space comes back in the background. Where deleted VDIs are kept for a while (the setting
        trash_days) it goes into the trash. Busy: somebody has it open."""

    @abstractmethod
    def trash(self) -> AsyncIterator[TrashStatus]:
        """The deleted VDIs that can still be brought back, the oldest first, with their space."""

    @abstractmethod
    async def undelete(self, name: str, new: str | None = None, *, vdi_id: int | None = None) -> VdiStatus:
        """Bring a VDI back from the trash, under another name if `new` is given. vdi_id: which of those of that name;
        default the one that was deleted last. NotFound; Exists: the name is taken."""

    @abstractmethod
    async def purge(self, name: str, *, vdi_id: int | None = None) -> None:
        """Delete a VDI in the trash for good; its space comes back in the background. NotFound."""

    @abstractmethod
    async def set_copies(self, name: str, copies: int) -> VdiStatus:
        """Change how many zones hold each object of a VDI; recovery makes or removes the copies."""

    @abstractmethod
    async def set_limits(
        self, name: str, limits: Mapping[str, tuple[int, int]], *, weight: int | None = None
    ) -> VdiStatus:
        """Limit what the clients of a VDI may do in a second, from now on; the process that has the zones open is not
        limited. limits: kind (settings.LIMIT_KINDS) -> rate and burst, in operations or bytes; rate 0 = none any more,
        burst 0 = a tenth of a second's worth; what is not named stays. weight: its part of the server's time
        when several VDIs want more than there is, relative to theirs (default 100). NotFound; InvalidRequest."""

    @abstractmethod
    async def damage(self, name: str) -> VdiDamage:
        """The parts of a VDI that no zone has whole, as far as is known."""

    @abstractmethod
    async def clone(self, source: str, name: str, *, copies: int | None = None, mode: str | None = None) -> VdiStatus:
        """Create a VDI that begins as a snapshot (NAME@TAG, NAME@INDEX), or as a VDI is now; durable on return. copies,
        mode: default as there."""

    @abstractmethod
    async def rename(self, name: str, new: str) -> VdiStatus:
        """Give a VDI, open or not, another name; its snapshots and attributes go with it."""

    @abstractmethod
    async def resize(self, name: str, size_bytes: int, *, force: bool = False, reconnect: bool = False) -> VdiStatus:
        """Make a VDI, open or not, larger; what is new reads as zeros. Open handles keep the size that they have.
        reconnect: handles and connections are closed then, whoever has them (handles are Fenced). force: it may become
        smaller; they are closed first, and nobody may open it then (Suspended) until `resume`."""

    @abstractmethod
    async def rollback(self, name: str, *, force: bool = False) -> SnapshotStatus:
        """Make a VDI what it was at a snapshot of it (NAME@TAG, NAME@INDEX); the answer is a new snapshot of what it
        was just now. Busy: it is open. force: close it first, whoever has it open (handles are Fenced from then on);
        nobody may open it then (Suspended) until `resume`."""

    @abstractmethod
    async def resume(self, name: str) -> VdiStatus:
        """Let a VDI be opened again that a forced change has suspended; nothing if it is not."""

    # -- snapshots ----------------------------------------------------------------------------------------------

    @abstractmethod
    def snapshots(self, name: str | None = None) -> AsyncIterator[SnapshotStatus]:
        """The snapshots of a VDI, oldest first, or all, those of deleted VDIs included. `open` takes their names."""

    @abstractmethod
    async def create_snapshot(
        self, name: str, tag: str = "", *, skip_unchanged: bool = False, protected: bool = False
    ) -> SnapshotTaken:
        """Take a snapshot of a VDI, open or not; what was acknowledged before is in it, and it is durable on return.
        tag: "" = only a number. skip_unchanged: not if nothing was written since the last one."""

    @abstractmethod
    async def create_group_snapshot(
        self, names: Sequence[str], tag: str, *, protected: bool = False
    ) -> list[SnapshotStatus]:
        """Take a snapshot of several VDIs at one instant and under one tag, all or none: what was acknowledged on any
        of them before is in it, what is asked for on any afterwards is not. Durable on return."""

    @abstractmethod
    async def snapshot_space(self, name: str) -> SnapshotSpace:
        """How much of a snapshot's data nothing else needs at this moment; costs what has changed between it and what
        shares something with it."""

    @abstractmethod
    async def protect_snapshot(self, name: str, *, protected: bool) -> SnapshotStatus:
        """Let nobody delete a snapshot (NAME@TAG, NAME@INDEX), or let it be deleted again."""

    @abstractmethod
    async def delete_snapshot(self, name: str) -> None:
        """Delete one; the space that only it needs comes back in the background. Busy: protected, or open."""

    # -- snapshots in and out -------------------------------------------------------------------------------------

    def export_diff(self, since: str, snapshot: str) -> AsyncIterator[bytes]:
        """What turns the contents of one snapshot (NAME@TAG, "" = an empty disk) into those of another, as a stream
        with checksums that `import_diff` of another store takes; pieces of about 1 MiB. It costs what the change costs.
        Format: objstore/format/STREAM.md."""
        return export.export_diff(self, since, snapshot)

    async def import_diff(
        self,
        stream: Pieces,
        name: str | None = None,
        *,
        tag: str | None = None,
        protected: bool = False,
    ) -> SnapshotStatus:
        """Put a stream of `export_diff` on a VDI, and take the snapshot that it was exported from. name, tag: default
        as there. A VDI that a whole snapshot is imported into is made; for a difference it must have a snapshot of what
        the stream builds on, and be as that is.

        FormatError: the stream is damaged or was cut short; then, and when this is interrupted, nobody can open the VDI
        until the import was repeated from the beginning, or the VDI was rolled back to a snapshot or deleted.
        InvalidRequest: the wrong VDI; NotFound; Exists; Busy: it is open, or half of another import.
        """
        return await export.import_diff(self, stream, name, tag=tag, protected=protected)

    # -- jobs ---------------------------------------------------------------------------------------------------

    @abstractmethod
    async def allocate(self, name: str, offset_bytes: int = 0, length_bytes: int = 0) -> JobStatus:
        """Begin a job that makes reserved zeros of the holes of a range (length 0 = to the end), and changes nothing
        else. It goes on by itself; `wait_for_job` returns when it has ended."""

    @abstractmethod
    async def flatten(self, name: str) -> JobStatus:
        """Begin a job that gives a clone, open or not, data of its own, so that it needs the snapshot that it is of no
        more. It goes on by itself, and may be repeated if it doesn't come to its end. InvalidRequest: it is no clone;
        Busy: it has snapshots that need the other one too."""

    @abstractmethod
    def jobs(self) -> AsyncIterator[JobStatus]:
        """Jobs that run, and those of the last day, oldest first."""

    @abstractmethod
    async def job(self, job_id: int) -> JobStatus:
        """One of them. NotFound."""

    @abstractmethod
    async def wait_for_job(self, job_id: int) -> JobStatus:
        """Return when it does not run any more; `state` says how it ended."""

    @abstractmethod
    async def abort_job(self, job_id: int) -> JobStatus:
        """Make it end at its next step, and wait for that. InvalidRequest: it does not run."""

    # -- attributes of a VDI -------------------------------------------------------------------------------------

    @abstractmethod
    def attributes(self, name: str) -> AsyncIterator[str]:
        """The names of a VDI's attributes, sorted."""

    @abstractmethod
    async def get_attribute(self, name: str, key: str) -> bytes:
        """An attribute's value. NotFound: there is none."""

    @abstractmethod
    async def set_attribute(self, name: str, key: str, value: bytes, *, exclusive: bool = False) -> None:
        """Set an attribute, in the place of what was there; durable on return. value: at most 64 KiB, any bytes.
        exclusive: Exists if there is one; of several that try at once exactly one succeeds."""

    @abstractmethod
    async def delete_attribute(self, name: str, key: str) -> None:
        """Remove an attribute; durable on return. NotFound: there is none."""

    # -- the store ----------------------------------------------------------------------------------------------

    @abstractmethod
    async def status(self) -> StoreStatus:
        """The store as a whole."""

    async def zones(self) -> list[ZoneStatus]:
        """Its zones, by number."""
        return (await self.status()).zones

    @abstractmethod
    async def change_zones(
        self, action: str, zone: str, *, path: str | None = None, weight: float | None = None, force: bool = False
    ) -> list[ZoneStatus]:
        """`add`, `drain`, `remove`, `replace` (by the directory `path`) or `set-weight` a zone, which is named by its
        path, its number or the beginning of its id; the zones as they are then."""

    @abstractmethod
    async def start_scrub(self) -> ScrubStatus:
        """Read and check every copy of everything now, in the background; `scrub` tells how far that is."""

    @abstractmethod
    async def scrub(self) -> ScrubStatus:
        """The scrub under way, or the last one."""

    @abstractmethod
    async def recovery(self) -> RecoveryStatus:
        """Which copies are missing, and how far their recovery is."""

    @abstractmethod
    async def set_recovery_rate(self, bytes_per_second: int) -> RecoveryStatus:
        """Limit recovery from now on; 0 = no limit."""

    @abstractmethod
    async def close(self) -> None:
        """Close what is open and leave; in this process also: make everything durable and give the zones back.
        Unavailable: not everything could be made durable; all is closed nevertheless. Idempotent."""

    @abstractmethod
    async def _open(self, name: str, read_only: bool) -> VdiHandle: ...

    @abstractmethod
    async def _begin_import(self, name: str, what: Begin) -> VdiHandle:
        """A handle that nobody else has, to be given what the stream has."""

    @abstractmethod
    async def _finish_import(self, vdi: VdiHandle, tag: str, protected: bool) -> SnapshotStatus:
        """All of it was written."""
