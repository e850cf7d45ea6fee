"""The commands of `sheepfold`: arguments in, text or JSON out. Imports what a command needs when it runs."""

import argparse
import logging
import os
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from nbdserver.cli_arguments import CONFIG_VARIABLE, Parser, build_parser
from objstore.errors import InvalidRequest

if TYPE_CHECKING:
    from nbdserver.cli_admin import Admin
    from nbdserver.config import Config
    from nbdserver.service import Ready


def run(arguments: argparse.Namespace) -> None:
    """Run the command. StoreError and OSError are its failures."""
    if arguments.command == "completion":
        completion(arguments.shell)
    elif arguments.command == "serve":
        serve(arguments)
    else:
        administer(arguments)


def completion(shell: str) -> None:
    """Print the completion script."""
    import shtab

    parser = build_parser()
    _mark_paths(parser, {"DIR": shtab.DIRECTORY, "FILE": shtab.FILE, "PATH": shtab.FILE})
    print(shtab.complete(parser, shell))


def serve(arguments: argparse.Namespace) -> None:
    """Serve until a signal; one line per export when connections are accepted."""
    config = _config(arguments)
    zones = _zones(arguments, config)
    from nbdserver import service
    from nbdserver.cli_progress import progress
    from nbdserver.config import Config, VdiConfig

    config = config or Config()
    given = {
        name: VdiConfig(size_bytes, copies=arguments.copies, mode=arguments.mode) for name, size_bytes in arguments.vdis
    }
    plan = service.ServePlan(
        zones=zones,
        vdis={**config.vdi, **given},
        listen=arguments.listen or config.listen,
        default=arguments.default or config.default,
        control=arguments.control or config.control,
        store=config.store,
        server=config.server,
    )
    logging.basicConfig(
        level=logging.INFO if arguments.verbose else logging.WARNING, format="sheepfold: %(levelname)s: %(message)s"
    )
    with ExitStack() as opening:
        opening.enter_context(progress("opening the store"))
        service.run(plan, lambda ready: _announce(ready, arguments.json), opening.close)


def _announce(ready: "Ready", as_json: bool) -> None:
    """One line per export with its URIs, the first listener's first."""
    from nbdserver.cli_output import json_line
    from objstore.units import format_size

    for name, size_bytes in ready.exports:
        uris = [listener.uri(name) for listener in ready.listeners]
        if as_json:
            print(json_line({"export": name, "size_bytes": size_bytes, "uris": uris}))
        else:
            print(name, format_size(size_bytes), *uris, sep="  ")
    if not ready.exports and not as_json:
        print("no VDI yet; create one: sheepfold vdi create NAME SIZE")
    sys.stdout.flush()


def administer(arguments: argparse.Namespace) -> None:
    """Every command that asks or changes a store, through its server or by opening the zones."""
    config = _config(arguments) if arguments.config or not arguments.zones else None
    zones = _zones(arguments, config)
    from nbdserver.cli_admin import open_admin
    from objstore.volume.settings import StoreSettings

    with open_admin(zones, StoreSettings() if config is None else config.store) as admin:
        if arguments.command == "status":
            _status(admin, arguments)
        else:
            _VDI_COMMANDS[arguments.vdi_command](admin, arguments)


def _status(admin: "Admin", arguments: argparse.Namespace) -> None:
    from nbdserver.cli_output import print_json, status_text

    status = admin.status()
    if arguments.json:
        print_json(status)
    else:
        print(status_text(status))


def _vdi_create(admin: "Admin", arguments: argparse.Namespace) -> None:
    from nbdserver.cli_output import print_json, vdi_details
    from nbdserver.cli_progress import progress

    with progress(f"creating {arguments.name}"):
        created = admin.create_vdi(
            arguments.name,
            arguments.size_bytes,
            copies=arguments.copies,
            mode=arguments.mode,
            prealloc=arguments.prealloc,
        )
    if arguments.json:
        print_json(created)
    else:
        print(vdi_details(created))


def _vdi_list(admin: "Admin", arguments: argparse.Namespace) -> None:
    from nbdserver.cli_output import print_json, vdi_table

    vdis = admin.vdis()
    if arguments.json:
        print_json(vdis)
    else:
        print(vdi_table(vdis))


def _vdi_info(admin: "Admin", arguments: argparse.Namespace) -> None:
    from nbdserver.cli_output import print_json, vdi_details

    vdi = admin.vdi(arguments.name)
    if arguments.json:
        print_json(vdi)
    else:
        print(vdi_details(vdi))


def _vdi_delete(admin: "Admin", arguments: argparse.Namespace) -> None:
    from nbdserver.cli_output import print_json
    from nbdserver.cli_progress import progress

    with progress(f"deleting {arguments.name}"):
        admin.delete_vdi(arguments.name)
    if arguments.json:
        print_json({"deleted": arguments.name})
    else:
        print(f"deleted {arguments.name}")


_VDI_COMMANDS = {"create": _vdi_create, "list": _vdi_list, "info": _vdi_info, "delete": _vdi_delete}


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
    return [Path(os.path.abspath(zone)) for zone in zones]


def _mark_paths(parser: argparse.ArgumentParser, kinds: Mapping[str, object]) -> None:
    """Tell shtab which arguments are files and directories, by their metavar."""
    for action in parser._actions:
        if isinstance(action.metavar, str) and action.metavar in kinds:
            action.complete = kinds[action.metavar]  # type: ignore[attr-defined]
        if isinstance(action.choices, dict):
            for command in action.choices.values():
                if isinstance(command, Parser):
                    _mark_paths(command, kinds)
