"""Where a server's sockets live when nobody says otherwise.

The runtime directory is the first of: $RUNTIME_DIRECTORY (systemd sets it), $XDG_RUNTIME_DIR/sheepfold, and
/run/sheepfold for root, /tmp/sheepfold-UID (mode 0700) for others.
"""

import hashlib
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from objstore.errors import InvalidRequest

NBD_SOCKET: Final = "sheepfold.sock"
NBD_ADDRESS: Final = "tcp://127.0.0.1:10809"


def runtime_directory(environ: Mapping[str, str], uid: int) -> Path:
    """The directory for sockets, not yet made."""
    if given := environ.get("RUNTIME_DIRECTORY", "").split(":")[0]:
        return Path(given)
    if session := environ.get("XDG_RUNTIME_DIR"):
        return Path(session, "sheepfold")
    return Path("/run/sheepfold") if uid == 0 else Path(f"/tmp/sheepfold-{uid}")


def make_runtime_directory(path: Path) -> None:
    """Make it if it is missing. InvalidRequest unless it is a directory that only this user can change."""
    try:
        path.mkdir(mode=0o755 if path.parent == Path("/run") else 0o700, exist_ok=True)
        found = path.lstat()
    except OSError as error:
        raise InvalidRequest(_unusable(path, error.strerror)) from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise InvalidRequest(_unusable(path, "not a directory that only this user can change"))


def _unusable(path: Path, reason: str | None) -> str:
    return f"directory for sockets {path}: {reason}; name other places with --listen and --control"


def control_path(directory: Path, zone: Path) -> Path:
    """The control socket of the store whose first zone is `zone`: the same at every start, other for another store."""
    digest = hashlib.blake2s(os.fsencode(zone.resolve()), digest_size=6).hexdigest()
    return directory / f"control-{digest}.sock"
