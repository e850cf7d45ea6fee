"""Virtual disks in replicated logs: the storage side of Sheepfold, and a library for programs that use its disks.

    import objstore

    async with objstore.connect(["/srv/a", "/srv/b"], create=True) as store:
        await store.create("disk", 10 << 30)
        async with store.open("disk") as vdi:
            await vdi.write(0, b"hello")
            await vdi.flush()

What `__all__` names is public and stays; everything else may change. `objstore.blocking` has the same for programs
without an event loop. Never imports nbdserver.
"""

from typing import TYPE_CHECKING, Any, Final

from objstore.errors import (
    Busy,
    Corrupt,
    Exists,
    Fenced,
    FormatError,
    InvalidRequest,
    NewerFormat,
    NoSpace,
    NotFound,
    NotSupported,
    OutOfRange,
    ReadOnly,
    Stopping,
    StoreError,
    Suspended,
    Unavailable,
)
from objstore.version import VERSION

if TYPE_CHECKING:
    from objstore.access import blocking
    from objstore.access.connect import connect, control_socket
    from objstore.access.connection import Connection
    from objstore.access.file import VdiFile
    from objstore.access.handle import VdiHandle
    from objstore.access.transfer import Hole
    from objstore.volume.base import Extent
    from objstore.volume.settings import StoreSettings
    from objstore.volume.status import (
        DamagedRange,
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

__all__ = [
    "VERSION",
    "Busy",
    "Connection",
    "Corrupt",
    "DamagedRange",
    "Exists",
    "Extent",
    "Fenced",
    "FormatError",
    "Hole",
    "InvalidRequest",
    "JobStatus",
    "NewerFormat",
    "NoSpace",
    "NotFound",
    "NotSupported",
    "OutOfRange",
    "ReadOnly",
    "RecoveryStatus",
    "ScrubStatus",
    "SnapshotSpace",
    "SnapshotStatus",
    "SnapshotTaken",
    "Stopping",
    "StoreError",
    "StoreSettings",
    "StoreStatus",
    "Suspended",
    "TrashStatus",
    "Unavailable",
    "VdiDamage",
    "VdiFile",
    "VdiHandle",
    "VdiStatus",
    "ZoneStatus",
    "blocking",
    "connect",
    "control_socket",
]

_WHERE: Final = {
    "Connection": "objstore.access.connection",
    "DamagedRange": "objstore.volume.status",
    "Extent": "objstore.volume.base",
    "Hole": "objstore.access.transfer",
    "JobStatus": "objstore.volume.status",
    "RecoveryStatus": "objstore.volume.status",
    "ScrubStatus": "objstore.volume.status",
    "SnapshotSpace": "objstore.volume.status",
    "SnapshotStatus": "objstore.volume.status",
    "SnapshotTaken": "objstore.volume.status",
    "StoreSettings": "objstore.volume.settings",
    "StoreStatus": "objstore.volume.status",
    "TrashStatus": "objstore.volume.status",
    "VdiDamage": "objstore.volume.status",
    "VdiFile": "objstore.access.file",
    "VdiHandle": "objstore.access.handle",
    "VdiStatus": "objstore.volume.status",
    "ZoneStatus": "objstore.volume.status",
    "connect": "objstore.access.connect",
    "control_socket": "objstore.access.connect",
}
"""Found when they are first asked for: importing a part of this package must not import all of it."""


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name == "blocking":
        return import_module("objstore.access.blocking")
    if name in _WHERE:
        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'objstore' has no attribute {name!r}")
