"""Arguments of the commands that ask a running server about its clients and what they do (cli_clients.py)."""

import argparse
from collections.abc import Callable
from typing import Final

Add = Callable[[argparse.ArgumentParser], None]

INTERVAL_SECONDS_MIN: Final = 0.2
INTERVAL_SECONDS_MAX: Final = 3600.0


def add_client(commands: argparse.ArgumentParser, common: Add) -> None:
    """`client list|kick|unfence`."""
    kinds = commands.add_subparsers(dest="client_command", metavar="COMMAND", required=True)
    common(kinds.add_parser("list", help="list the connections and the clients that are fenced"))
    kick = kinds.add_parser("kick", help="end the connections of a client, or one connection")
    kick.add_argument(
        "client", metavar="CLIENT", help="certificate:NAME, uid:NUMBER, address:IP, or a connection's number"
    )
    kick.add_argument("--fence", action="store_true", help="at once, and refuse the client from now on")
    kick.add_argument("--seconds", metavar="N", type=float, help="how long to refuse it (default: until unfence)")
    common(kick)
    unfence = kinds.add_parser("unfence", help="let a fenced client in again")
    unfence.add_argument("client", metavar="CLIENT", help="as `client list` shows it")
    common(unfence)


def add_top(parser: argparse.ArgumentParser, common: Add) -> None:
    """`top`."""
    parser.add_argument("--once", action="store_true", help="one look, over one interval, instead of a live view")
    parser.add_argument(
        "--interval", metavar="SECONDS", type=_interval, default=2.0, help="between two looks (default: 2)"
    )
    common(parser)


def _interval(text: str) -> float:
    seconds = float(text)
    if not INTERVAL_SECONDS_MIN <= seconds <= INTERVAL_SECONDS_MAX:
        raise argparse.ArgumentTypeError(
            f"{text!r} is out of range: {INTERVAL_SECONDS_MIN} to {INTERVAL_SECONDS_MAX:.0f} seconds are possible"
        )
    return seconds
