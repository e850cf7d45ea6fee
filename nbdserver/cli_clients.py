"""Commands that need a running server: `sheepfold client` (who is connected, and how to get rid of somebody) and
`sheepfold reload`."""

import argparse

from nbdserver.cli_output import print_json, show, table
from nbdserver.control_client import ControlClient
from objstore.access.api import Clients
from objstore.units import format_size


def clients_text(clients: Clients) -> str:
    """One line for each connection, then one for each fenced client."""
    header = ("NUMBER", "CLIENT", "EXPORT", "STATE", "SECONDS", "REQUESTS", "ERRORS", "IN FLIGHT", "IN", "OUT", "PEER")
    rows = [
        (
            str(one.connection),
            one.client,
            one.export or "-",
            one.state,
            f"{one.connected_seconds:.0f}",
            str(one.request_count),
            str(one.error_count),
            str(one.in_flight),
            format_size(one.received_bytes),
            format_size(one.sent_bytes),
            one.peer,
        )
        for one in clients.connections
    ]
    lines = [table([header, *rows])] if rows else ["no connections"]
    for fence in clients.fenced:
        left = "until it is let in" if fence.seconds_left is None else f"for {fence.seconds_left:.0f} seconds"
        lines.append(f"fenced {left}: {fence.client}")
    return "\n".join(lines)


def client(server: ControlClient, arguments: argparse.Namespace) -> None:
    """`client list|kick|unfence`."""
    if arguments.client_command == "list":
        show(server.clients(), clients_text, as_json=arguments.json)
    elif arguments.client_command == "kick":
        kicked = server.kick(arguments.client, fence=arguments.fence, seconds=arguments.seconds)
        if arguments.json:
            print_json(kicked)
        else:
            print(f"{'fenced' if arguments.fence else 'kicked'} {kicked.client}: {kicked.closed} connections closed")
            if not kicked.settled:
                print("something that it asked for is still under way and may happen")
    else:
        server.unfence(arguments.client)
        if arguments.json:
            print_json({"unfenced": arguments.client})
        else:
            print(f"unfenced {arguments.client}")


def reload(server: ControlClient, arguments: argparse.Namespace) -> None:
    """`reload`: have the server read its configuration again."""
    reloaded = server.reload()
    if arguments.json:
        print_json(reloaded)
        return
    print("the configuration was read again")
    if reloaded.restart_needed:
        print(f"changed, but counting only from the next start on: {', '.join(reloaded.restart_needed)}")
