"""Arguments of the commands that ask a running server about its clients and what they do (cli_clients.py)."""

import argparse
from collections.abc import Callable

Add = Callable[[argparse.ArgumentParser], None]


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
