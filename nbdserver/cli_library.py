"""The commands that work on what VDIs hold, through the library: attached (through the server) and offline alike."""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from nbdserver.cli_admin import POLL_SECONDS, WAIT_SECONDS, holder, note_of, resolve_zones
from nbdserver.cli_diff import diff, export_diff, import_diff
from nbdserver.cli_jobs import allocate, flatten, job
from nbdserver.cli_output import limits_text, print_json, show, snapshot_table
from nbdserver.cli_progress import progress
from nbdserver.cli_transfer import download, show_map, upload
from nbdserver.cli_trash import purge, trash, undelete
from nbdserver.control_client import ControlClient, NoServer
from objstore.access import blocking
from objstore.errors import Busy
from objstore.volume.settings import LIMIT_KINDS, StoreSettings


@contextmanager
def open_library(
    zones: Sequence[Path], settings: StoreSettings, *, force: bool = False, read_only: bool = False
) -> Iterator[blocking.BlockingConnection]:
    """The store that has one of `zones`, as open_admin finds it."""
    deadline = time.monotonic() + WAIT_SECONDS
    with progress("waiting for the store"):
        while (connection := _connect_or_open(zones, settings, force, read_only)) is None:
            if time.monotonic() > deadline:
                raise Busy(f"zone {zones[0]} is in use by {holder(zones)} which does not answer")
            time.sleep(POLL_SECONDS)
    with connection:
        yield connection


def _connect_or_open(
    zones: Sequence[Path], settings: StoreSettings, force: bool, read_only: bool
) -> blocking.BlockingConnection | None:
    """None: the zones are locked, and their holder doesn't answer at the moment."""
    note = note_of(zones)
    if note is None:
        try:
            return blocking.connect(resolve_zones(zones), settings=settings, force=force, read_only=read_only)
        except Busy:
            return None
    if not note.control:
        return None
    try:
        ControlClient(note.control).close()
    except NoServer:
        return None
    return blocking.connect(socket=note.control)


def attr(store: blocking.BlockingConnection, arguments: argparse.Namespace) -> None:
    """`vdi attr`: values come from the command line or stdin, and go to stdout as they are."""
    name, key = arguments.name, getattr(arguments, "key", "")
    if arguments.attr_command == "list":
        keys = list(store.attributes(name))
        if arguments.json:
            print_json(keys)
        else:
            print(*keys, sep="\n", end="\n" if keys else "")
    elif arguments.attr_command == "get":
        value = store.get_attribute(name, key)
        if arguments.json:
            print_json({"name": key, "value_base64": value})
        else:
            sys.stdout.buffer.write(value)
    elif arguments.attr_command == "set":
        value = sys.stdin.buffer.read() if arguments.value is None else arguments.value.encode()
        store.set_attribute(name, key, value, exclusive=arguments.exclusive)
        if arguments.json:
            print_json({"name": key, "length_bytes": len(value)})
    else:
        store.delete_attribute(name, key)
        if arguments.json:
            print_json({"deleted": key})


def limit(store: blocking.BlockingConnection, arguments: argparse.Namespace) -> None:
    """`vdi limit`: sets what is given, and shows what is then in force."""
    given = {kind: getattr(arguments, kind.replace("-", "_")) for kind in LIMIT_KINDS}
    wanted = {kind: value for kind, value in given.items() if value is not None}
    if wanted or arguments.weight is not None:
        vdi = store.set_limits(arguments.name, wanted, weight=arguments.weight)
    else:
        vdi = store.info(arguments.name)
    if arguments.json:
        print_json({"limits": vdi.limits, "weight": vdi.weight})
    else:
        print(limits_text(vdi.limits), f"weight {vdi.weight}", sep="\n")


def snapshot_group(store: blocking.BlockingConnection, arguments: argparse.Namespace) -> None:
    """`vdi snapshot-group`."""
    with progress(f"taking a snapshot of {len(arguments.names)} VDIs"):
        taken = store.create_group_snapshot(arguments.names, arguments.tag, protected=arguments.protect)
    show(taken, snapshot_table, as_json=arguments.json)


def exclusive(store: blocking.BlockingConnection, arguments: argparse.Namespace) -> None:
    """`vdi exclusive`."""
    with progress(f"comparing {arguments.name}"):
        space = store.snapshot_space(arguments.name)
    if arguments.json:
        print_json(space)
    else:
        print(f"{space.name}: {space.exclusive_bytes} bytes of data that nothing else needs")


COMMANDS: Final[dict[str, Callable[[blocking.BlockingConnection, argparse.Namespace], None]]] = {
    "attr": attr,
    "limit": limit,
    "download": download,
    "upload": upload,
    "map": show_map,
    "diff": diff,
    "export-diff": export_diff,
    "import-diff": import_diff,
    "allocate": allocate,
    "flatten": flatten,
    "job": job,
    "snapshot-group": snapshot_group,
    "exclusive": exclusive,
    "trash": trash,
    "undelete": undelete,
    "purge": purge,
}
