"""Operations of the control API on deleted VDIs that are kept in the trash."""

from typing import Protocol

from nbdserver.operations import operation
from objstore.access.api import Undelete
from objstore.volume.status import TrashStatus, VdiStatus


class StoreWithTrash(Protocol):
    """objstore.volume.trash.TrashOperations."""

    async def trash(self) -> list[TrashStatus]: ...
    async def undelete(self, name: str, new: str | None = None, *, vdi_id: int | None = None) -> VdiStatus: ...
    async def purge(self, name: str, *, vdi_id: int | None = None) -> None: ...


class TrashHandlers:
    """The trash of a store."""

    def __init__(self, store: StoreWithTrash) -> None:
        self._store = store

    @operation("GET", "/v1/trash")
    async def list_trash(self) -> list[TrashStatus]:
        """Deleted VDIs that can still be brought back, the oldest first, with their space."""
        return await self._store.trash()

    @operation("POST", "/v1/trash/{name}/undelete")
    async def undelete(self, name: str, body: Undelete) -> VdiStatus:
        """Bring a VDI back from the trash: the last deleted one of that name, or the one of a number."""
        return await self._store.undelete(name, body.name, vdi_id=body.vdi_id)

    @operation("DELETE", "/v1/trash/{name}")
    async def purge(self, name: str, vdi_id: int | None = None) -> None:
        """Delete a VDI in the trash for good: the last deleted one of that name, or the one of a number."""
        await self._store.purge(name, vdi_id=vdi_id)
