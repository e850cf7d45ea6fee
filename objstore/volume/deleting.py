"""Which VDIs are just being deleted, and waiting for that to be over: they are gone then, hidden, or stay after all."""

import asyncio
from collections.abc import Iterable, Iterator

from objstore.errors import NotFound


class BeingDeleted(NotFound):
    """The VDI is just being deleted."""


class Deleting:
    """The ids of those VDIs. Touched by the event loop only."""

    def __init__(self) -> None:
        self._ids: set[int] = set()
        self._changed: asyncio.Future[None] | None = None

    def __contains__(self, vdi_id: object) -> bool:
        return vdi_id in self._ids

    def __iter__(self) -> Iterator[int]:
        return iter(self._ids)

    def begin(self, vdi_ids: Iterable[int]) -> None:
        """These too, from now on. Idempotent."""
        self._ids.update(vdi_ids)
        self._wake()

    def end(self, vdi_ids: Iterable[int]) -> None:
        """These no more. Idempotent."""
        self._ids.difference_update(vdi_ids)
        self._wake()

    async def change(self) -> None:
        """Return when others are being deleted than now."""
        if self._changed is None:
            self._changed = asyncio.get_running_loop().create_future()
        await asyncio.shield(self._changed)

    def _wake(self) -> None:
        changed, self._changed = self._changed, None
        if changed is not None:
            changed.set_result(None)
