"""The commands of `sheepfold`: arguments in, text or JSON out. Imports what a command needs when it runs."""

import argparse
import dataclasses
import logging
import os
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from nbdserver.cli_arguments import CONFIG_VARIABLE, Parser, build_parser
from objstore.errors import InvalidRequest

if TYPE_CHECKING:
    from nbdserver.cli_admin import Admin
    from nbdserver.config import Config
    from nbdserver.service import Ready, ServePlan
    from nbdserver.tls import TlsSettings


LIBRARY_COMMANDS: Final = frozenset(
    ("attr", "limit", "download", "upload", "allocate", "flatten", "map", "undelete", "purge")
) | {"diff", "export-diff", "import-diff", "snapshot-group", "exclusive"}
"""Those of `vdi` that cli_library.py has."""


def run(arguments: argparse.Namespace) -> int:
    """Run the command; its exit code. StoreError and OSError are its failures."""
    if arguments.command == "completion":
        completion(arguments.shell)
    elif arguments.command == "serve":
        serve(arguments)
    elif arguments.command == "tls":
        from nbdserver.cli_tls import make

        make(arguments)
    elif arguments.command in ("attach", "detach"):
        from nbdserver.attach.command import attach, detach

        return (attach if arguments.command == "attach" else detach)(arguments)
    elif arguments.command == "check":
        from nbdserver.cli_check import check

        config = _config(arguments) if arguments.config or not arguments.zones else None
        return check(arguments, _zones(arguments, config))
    else:
        administer(arguments)
    return 0


def completion(shell: str) -> None:
    """Print the completion script."""
    import shtab

    parser = build_parser()
    _mark_paths(parser, {"DIR": shtab.DIRECTORY, "FILE": shtab.FILE, "PATH": shtab.FILE})
    print(shtab.complete(parser, shell))


def serve(arguments: argparse.Namespace) -> None:
    """Serve until a signal; one line per export when connections are accepted."""
    plan = _plan(arguments)
    from nbdserver import service
    from nbdserver.cli_progress import progress

    _log(logging.INFO if arguments.verbose else logging.WARNING, plan.log_format)
    with ExitStack() as opening:
        opening.enter_context(progress("opening the store"))
        service.run(
            plan, lambda ready: _announce(ready, arguments.json), opening.close, reread=lambda: _plan(arguments)
        )


def _plan(arguments: argparse.Namespace) -> "ServePlan":
    """What the command line and, at this moment, the configuration file say."""
    config = _config(arguments)
    zones = _zones(arguments, config)
    from nbdserver.config import Config, VdiConfig
    from nbdserver.service import ServePlan

    config = config or Config()
    names = [name for name, _ in arguments.vdis]
    for name in names:
        if names.count(name) > 1:
            raise InvalidRequest(f"VDI {name} is given twice")
    given = {
        name: VdiConfig(size_bytes, copies=arguments.copies, mode=arguments.mode) for name, size_bytes in arguments.vdis
    }
    return ServePlan(
        zones=zones,
        vdis={**config.vdi, **given},
        listen=arguments.listen or config.listen,
        default=arguments.default or config.default,
        control=arguments.control or config.control,
        metrics=arguments.metrics or config.metrics,
        log_format=arguments.log_format or config.log_format,
        store=config.store,
        server=replace(config.server, list_snapshots=True) if arguments.list_snapshots else config.server,
        force=arguments.force_open,
        swap=arguments.swap,
        tls=_tls(arguments, config.tls),
        access=config.access,
    )


def _tls(arguments: argparse.Namespace, configured: "TlsSettings") -> "TlsSettings":
    """What the configuration says, as far as the command line does not say something else."""
    given: dict[str, object] = {}
    if arguments.tls:
        given["mode"] = arguments.tls
    if arguments.tls_certificates:
        given["certificates"] = arguments.tls_certificates
    if arguments.tls_any_client:
        given["verify_clients"] = False
    if arguments.tls_psk:
        given["psk"] = arguments.tls_psk
    try:
        return dataclasses.replace(configured, **given)  # type: ignore[arg-type]  # each of its field's type
    except InvalidRequest as error:
        raise InvalidRequest(f"TLS: {error}") from error


def _announce(ready: "Ready", as_json: bool) -> None:
    """One line per export with its URIs, the first listener's first."""
    from nbdserver.cli_output import json_line
    from objstore.units import format_size

    for name, size_bytes in ready.exports:
        uris = [listener.uri(name, tls=ready.tls_only) for listener in ready.listeners]
        if as_json:
            print(json_line({"export": name, "size_bytes": size_bytes, "uris": uris}))
        else:
            print(name, format_size(size_bytes), *uris, sep="  ")
    if not ready.exports and not as_json:
        print("no VDI yet; create one: sheepfold vdi create NAME SIZE")
    sys.stdout.flush()


def _log(level: int, kind: str = "text") -> None:
    from nbdserver.logs import configure

    configure(kind, level)


def administer(arguments: argparse.Namespace) -> None:
    """Every command that asks or changes a store, through its server or by opening the zones."""
    config = _config(arguments) if arguments.config or not arguments.zones else None
    zones = _zones(arguments, config)
    from nbdserver.cli_admin import open_admin
    from objstore.volume.settings import StoreSettings

    _log(logging.WARNING)
    shown = getattr(arguments, "vdi_command", "") in ("list", "info", "snapshots", "tree")
    looking = shown or arguments.command in ("status", "store", "trash")
    settings = StoreSettings() if config is None else config.store
    force = getattr(arguments, "force_open", False)
    if arguments.command in ("job", "trash") or getattr(arguments, "vdi_command", "") in LIBRARY_COMMANDS:
        from nbdserver.cli_library import COMMANDS as LIBRARY
        from nbdserver.cli_library import open_library

        with open_library(zones, settings, force=force, read_only=looking) as store:
            LIBRARY[getattr(arguments, "vdi_command", arguments.command)](store, arguments)
        return
    if arguments.command == "client":
        from nbdserver.cli_admin import open_server
        from nbdserver.cli_clients import client

        with open_server(zones) as server:
            client(server, arguments)
        return
    if arguments.command == "top":
        from nbdserver.cli_admin import open_server
        from nbdserver.cli_top import top

        with open_server(zones) as server:
            top(server, arguments)
        return
    if arguments.command == "reload":
        from nbdserver.cli_admin import open_server
        from nbdserver.cli_clients import reload

        with open_server(zones) as server:
            reload(server, arguments)
        return
    with open_admin(zones, settings, read_only=looking, force=force) as admin:
        if arguments.command == "status":
            _status(admin, arguments)
        elif arguments.command == "store":
            (_store_upgrade if arguments.store_command == "upgrade" else _store_info)(admin, arguments)
        elif arguments.command == "scrub":
            from nbdserver.cli_copies import scrub

            scrub(admin, arguments)
        elif arguments.command == "recovery":
            from nbdserver.cli_copies import recovery

            recovery(admin, arguments)
        elif arguments.command == "zone":
            from nbdserver.cli_copies import zone

            zone(admin, arguments)
        elif arguments.vdi_command in _VDI_COMMANDS:
            _VDI_COMMANDS[arguments.vdi_command](admin, arguments)
        else:
            from nbdserver.cli_snapshots import COMMANDS

            COMMANDS[arguments.vdi_command](admin, arguments)


def _status(admin: "Admin", arguments: argparse.Namespace) -> None:
    from nbdserver.cli_output import show, status_text

    status = admin.status()
    show(status, status_text, as_json=arguments.json)


def _store_info(admin: "Admin", arguments: argparse.Namespace) -> None:
    from nbdserver.cli_output import info_text, show

    info = admin.info()
    show(info, info_text, as_json=arguments.json)


def _store_upgrade(admin: "Admin", arguments: argparse.Namespace) -> None:
    """Opening has refused what this program doesn't know; of what it knows, version 1 is the only one."""
    from nbdserver.cli_output import print_json

    version = admin.info().format_version
    if arguments.json:
        print_json({"format_version": version, "changed": []})
    else:
        print(f"format {version} is the newest that this program writes: nothing to change")


def _vdi_create(admin: "Admin", arguments: argparse.Namespace) -> None:
    from nbdserver.cli_output import show, vdi_details
    from nbdserver.cli_progress import progress

    with progress(f"creating {arguments.name}"):
        created = admin.create_vdi(
            arguments.name,
            arguments.size_bytes,
            copies=arguments.copies,
            mode=arguments.mode,
            prealloc=arguments.prealloc,
        )
    show(created, vdi_details, as_json=arguments.json)


def _vdi_list(admin: "Admin", arguments: argparse.Namespace) -> None:
    from nbdserver.cli_output import show, vdi_table

    vdis = admin.vdis()
    show(vdis, vdi_table, as_json=arguments.json)


def _vdi_info(admin: "Admin", arguments: argparse.Namespace) -> None:
    from nbdserver.cli_output import show, vdi_details

    vdi = admin.vdi(arguments.name)
    show(vdi, vdi_details, as_json=arguments.json)


def _vdi_delete(admin: "Admin", arguments: argparse.Namespace) -> None:
    from nbdserver.cli_output import print_json
    from nbdserver.cli_progress import progress

    with progress(f"deleting {arguments.name}"):
        if "@" in arguments.name:
            admin.delete_snapshot(arguments.name)
        else:
            admin.delete_vdi(arguments.name)
    if arguments.json:
        print_json({"deleted": arguments.name})
    else:
        print(f"deleted {arguments.name}")


def _vdi_set_copies(admin: "Admin", arguments: argparse.Namespace) -> None:
    from nbdserver.cli_output import print_json, vdi_details

    changed = admin.set_copies(arguments.name, arguments.copies)
    if arguments.json:
        print_json(changed)
    else:
        print(vdi_details(changed))


def _vdi_damage(admin: "Admin", arguments: argparse.Namespace) -> None:
    from nbdserver.cli_output import damage_text, show

    damage = admin.damage(arguments.name)
    show(damage, damage_text, as_json=arguments.json)


_VDI_COMMANDS = {
    "create": _vdi_create,
    "list": _vdi_list,
    "info": _vdi_info,
    "delete": _vdi_delete,
    "damage": _vdi_damage,
    "set-copies": _vdi_set_copies,
}


def _config(arguments: argparse.Namespace) -> "Config | None":
    """What the file of --config or of the environment says, None without one."""
    path = arguments.config or os.environ.get(CONFIG_VARIABLE)
    if not path:
        return None
    from nbdserver.config import load

    return load(Path(path))


def _zones(arguments: argparse.Namespace, config: "Config | None") -> list[Path]:
    """Zones of the command line, else of the configuration; at least one, absolute."""
    zones = arguments.zones or (list(config.zones) if config is not None else [])
    if not zones:
        raise InvalidRequest(
            f"which store? Give --zone DIR, or --config FILE (or ${CONFIG_VARIABLE}) that names `zones`"
        )
    try:
        return [Path(os.path.abspath(zone)) for zone in zones]
    except FileNotFoundError as error:
        raise InvalidRequest(f"zone {zones[0]}: the current directory is gone, so give whole paths") from error


def _mark_paths(parser: argparse.ArgumentParser, kinds: Mapping[str, object]) -> None:
    """Tell shtab which arguments are files and directories, by their metavar."""
    for action in parser._actions:
        if isinstance(action.metavar, str) and action.metavar in kinds:
            action.complete = kinds[action.metavar]  # type: ignore[attr-defined]
        if isinstance(action.choices, dict):
            for command in action.choices.values():
                if isinstance(command, Parser):
                    _mark_paths(command, kinds)
