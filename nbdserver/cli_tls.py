"""`sheepfold tls`: certificates on the command line."""

import argparse
from pathlib import Path


def make(arguments: argparse.Namespace) -> None:
    """Write throw-away certificates and say how they are used."""
    from nbdserver.cli_output import print_json
    from nbdserver.tls_make import make_certificates

    directory = Path(arguments.directory)
    hosts = list(dict.fromkeys([*arguments.hosts, "localhost", "127.0.0.1", "::1"]))
    clients = list(dict.fromkeys(arguments.clients or ["client"]))
    server, *folders = make_certificates(directory, hosts=hosts, clients=clients, days=arguments.days)
    if arguments.json:
        print_json({"server": str(server), "clients": [str(folder) for folder in folders]})
        return
    print(f"server: sheepfold serve --tls forced --tls-certificates {server}")
    for folder in folders:
        print(f"client: nbdinfo 'nbds://HOST/?tls-certificates={folder.absolute()}'")
