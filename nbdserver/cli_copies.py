"""The commands that look after copies: `sheepfold scrub`, `sheepfold recovery`, `sheepfold zone`."""

import argparse
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, TypeVar

from nbdserver.cli_output import print_json, recovery_text, scrub_text, zone_table
from objstore.errors import Corrupt
from objstore.volume.status import RecoveryStatus, ScrubStatus

if TYPE_CHECKING:
    from nbdserver.cli_admin import Admin

POLL_SECONDS: Final = 0.2

S = TypeVar("S", ScrubStatus, RecoveryStatus)


def scrub(admin: "Admin", arguments: argparse.Namespace) -> None:
    """Begin a pass; wait for its end if asked to, or if no server goes on with it. Corrupt: copies are bad and could
    not be replaced."""
    status = admin.start_scrub()
    if arguments.follow or admin.status().server is None:
        status = follow("scrub", admin, admin.scrub_status)
    if arguments.json:
        print_json(status)
    else:
        print(scrub_text(status))
    if not status.running and status.copies_unrepaired:
        raise Corrupt(f"{status.copies_unrepaired} bad copies could not be replaced: sheepfold status says more")


def recovery(admin: "Admin", arguments: argparse.Namespace) -> None:
    """Show recovery; change its limit, wait for its end if asked to."""
    if arguments.rate is not None:
        admin.set_recovery_rate(arguments.rate)
    status = follow("recovery", admin, admin.recovery_status) if arguments.follow else admin.recovery_status()
    if arguments.json:
        print_json(status)
    else:
        print(recovery_text(status))


def zone(admin: "Admin", arguments: argparse.Namespace) -> None:
    """List zones, or change them and list them then. Without a server a change waits for its recovery."""
    command = arguments.zone_command
    if command == "list":
        zones = admin.status().store.zones
    else:
        given = vars(arguments)
        zones = admin.change_zones(
            command,
            arguments.which,
            path=given.get("path"),
            weight=given.get("weight"),
            force=given.get("force", False),
        )
        if admin.status().server is None:
            follow("recovery", admin, admin.recovery_status)
    if arguments.json:
        print_json(zones)
    else:
        print(zone_table(zones))


def follow(what: str, admin: "Admin", ask: Callable[[], S]) -> S:
    """Wait until the work is done, with a bar on a terminal."""
    status = ask()
    if not sys.stderr.isatty():
        while status.running:
            admin.wait(POLL_SECONDS)
            status = ask()
        return status
    from tqdm import tqdm

    with tqdm(desc=what, total=0, unit="B", unit_scale=True, unit_divisor=1024, leave=False, file=sys.stderr) as bar:
        while status.running:
            bar.total = status.bytes_total
            bar.n = status.bytes_done
            bar.refresh()
            admin.wait(POLL_SECONDS)
            status = ask()
    return status
