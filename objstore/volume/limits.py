"""What the clients of a VDI may do in a second, as an administrator set it: kept in the catalog."""

import asyncio
from collections.abc import Callable, Mapping

from msgspec.structs import replace

from objstore.errors import InvalidRequest
from objstore.format.catalog import Limit, VdiEntry
from objstore.volume.catalog import Catalog
from objstore.volume.settings import WEIGHT_MAX
from objstore.volume.throttle import checked
from objstore.volume.vdi import Vdi


class Limits:
    """The limits of a store's VDIs, kept in the catalog."""

    def __init__(
        self,
        catalog: Catalog,
        change: asyncio.Lock,
        entry_of: Callable[[str], VdiEntry],
        opened: Callable[[int], Vdi | None],
    ) -> None:
        """change: held while an entry of the catalog is made from the one before. entry_of: the VDI of that name;
        NotFound. opened: the VDI of that id, if its log is open."""
        self._catalog = catalog
        self._change = change
        self._entry_of = entry_of
        self._opened = opened

    async def set(self, name: str, limits: Mapping[str, tuple[int, int]], weight: int | None = None) -> None:
        """Set the limits that are named (kind -> rate and burst, 0 = none and the usual one), durably; who waits is
        judged by them at once. weight: None = as it is. NotFound; InvalidRequest: a kind or a number that there is not.
        """
        if weight is not None and not 1 <= weight <= WEIGHT_MAX:
            raise InvalidRequest(f"weight {weight} is out of range: 1 to {WEIGHT_MAX}")
        given = {kind: Limit(rate, burst) for kind, (rate, burst) in limits.items()}
        checked(given)
        async with self._change:
            entry = self._entry_of(name)
            now = checked({**entry.limits, **given})
            weight = entry.weight if weight is None else weight
            await self._catalog.commit(replace(entry, limits=now, weight=weight))
            vdi = self._opened(entry.vdi_id)
            if vdi is not None:
                vdi.limit(now, weight)
