"""Attributes of VDIs: small named values that belong to whoever sets them. One catalog record each."""

import asyncio
from collections.abc import Callable
from typing import Final

from objstore.errors import Exists, InvalidRequest, NoSpace, NotFound
from objstore.format.catalog import AttributeEntry, VdiEntry
from objstore.names import check_attribute
from objstore.volume.catalog import Catalog

VALUE_BYTES_MAX: Final = 64 << 10
ATTRIBUTES_BYTES_MAX: Final = 1 << 20
"""Of one VDI, names and values: the catalog keeps all of them in memory, and writes them at every start."""


class Attributes:
    """The attributes of a store's VDIs. Changes are made one after the other: whether a name is free is asked and
    answered before anybody else asks."""

    def __init__(self, catalog: Catalog, entry_of: Callable[[str], VdiEntry]) -> None:
        """entry_of: the VDI of that name; NotFound."""
        self._catalog = catalog
        self._entry_of = entry_of
        self._turn = asyncio.Lock()

    def _of(self, entry: VdiEntry) -> dict[str, bytes]:
        return self._catalog.state.attributes.get(entry.vdi_id, {})

    def names(self, name: str) -> dict[str, int]:
        """The attributes' names, sorted, with the lengths of their values in bytes. NotFound: no such VDI."""
        return {key: len(value) for key, value in sorted(self._of(self._entry_of(name)).items())}

    def get(self, name: str, key: str) -> bytes:
        """NotFound: no such VDI, or no such attribute of it."""
        value = self._of(self._entry_of(name)).get(key)
        if value is None:
            raise NotFound(f"VDI {name!r} has no attribute {key!r}")
        return value

    async def set(self, name: str, key: str, value: bytes, *, exclusive: bool = False) -> None:
        """Set a value, durably. exclusive: Exists if there is one; of several that try at once exactly one succeeds.
        InvalidRequest: name or length; NoSpace: the VDI has too many."""
        check_attribute(key)
        if len(value) > VALUE_BYTES_MAX:
            raise InvalidRequest(f"attribute {key!r}: {len(value)} bytes; at most {VALUE_BYTES_MAX} are possible")
        async with self._turn:
            entry = self._entry_of(name)
            found = self._of(entry)
            if exclusive and key in found:
                raise Exists(f"VDI {name!r} has an attribute {key!r} already")
            others = sum(len(other.encode()) + len(kept) for other, kept in found.items() if other != key)
            if others + len(key.encode()) + len(value) > ATTRIBUTES_BYTES_MAX:
                raise NoSpace(f"VDI {name!r}: its attributes would have more than {ATTRIBUTES_BYTES_MAX} bytes")
            await self._catalog.commit(AttributeEntry(vdi_id=entry.vdi_id, name=key, value=value))

    async def delete(self, name: str, key: str) -> None:
        """Remove one, durably. NotFound."""
        async with self._turn:
            entry = self._entry_of(name)
            if key not in self._of(entry):
                raise NotFound(f"VDI {name!r} has no attribute {key!r}")
            await self._catalog.commit(AttributeEntry(vdi_id=entry.vdi_id, name=key, value=None))
