"""A store for tests of the control side: VDIs in a dictionary, every promise of ControlledStore, no zones."""

from objstore.errors import Busy, Exists, InvalidRequest, NoSpace, NotFound
from objstore.names import check_name
from objstore.units import GIB, TIB
from objstore.volume.settings import MODES
from objstore.volume.status import StoreStatus, VdiStatus, ZoneStatus

CAPACITY_BYTES = TIB
"""A preallocation of more than this meets NoSpace."""


class FakeStore:
    """attached: names that `delete_vdi` finds in use."""

    def __init__(self) -> None:
        self._vdis: dict[str, VdiStatus] = {}
        self.attached: set[str] = set()

    async def status(self) -> StoreStatus:
        zone = ZoneStatus(id="0f" * 16, path="/srv/a", state="in", reason="", used_bytes=GIB, free_bytes=TIB, epoch=1)
        return StoreStatus(
            store_id="ab" * 16,
            format_version=1,
            health="ok",
            reasons=[],
            zones=[zone],
            epoch=1,
            vdis=len(self._vdis),
            dirty_bytes=0,
            dirty_bytes_max=64 << 20,
            unclean_stop=None,
            started=1_700_000_000.0,
            version="test",
        )

    def vdis(self) -> list[VdiStatus]:
        return [self._vdis[name] for name in sorted(self._vdis)]

    def vdi(self, name: str) -> VdiStatus:
        if name not in self._vdis:
            raise NotFound(f"no VDI of this name: vdi={name}")
        return self._vdis[name]

    async def create_vdi(
        self,
        name: str,
        size_bytes: int,
        *,
        copies: int | None = None,
        mode: str = MODES[0],
        prealloc: bool = False,
    ) -> VdiStatus:
        check_name(name)
        if name in self._vdis:
            raise Exists(f"the name is taken: vdi={name}")
        if copies is not None and copies > 3:
            raise InvalidRequest(f"more copies than zones: copies={copies} zones=3")
        if prealloc and size_bytes > CAPACITY_BYTES:
            raise NoSpace(f"not enough room: vdi={name} size={size_bytes}")
        number = len(self._vdis) + 1
        self._vdis[name] = VdiStatus(
            name=name,
            vdi_id=number,
            size_bytes=size_bytes,
            copies=copies or 3,
            mode=mode,
            created=1_700_000_000.0,
            attached=0,
            state="closed",
            reason="",
            live_bytes=0,
            dirty_bytes=0,
            last_flush=None,
            log=number,
        )
        return self._vdis[name]

    async def delete_vdi(self, name: str) -> None:
        self.vdi(name)
        if name in self.attached:
            raise Busy(f"in use by a client: vdi={name}")
        del self._vdis[name]
