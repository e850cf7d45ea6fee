"""A running NBD server as tests see it: where it listens, what it exports. And foreign servers behind the same face.

The foreign ones (nbdkit, qemu-nbd) answer the question whether the specification's tests read the text as others do:
`pytest tests/spec --volume-kind nbdkit`. They serve one plain disk; tests that need more are skipped there.
"""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.clients import find
from tests.support.nbd_client import CLIENT_FLAGS, NbdClient, attached, connected

MIB = 1 << 20


@dataclass(frozen=True)
class Disk:
    """An export that a test asks for."""

    name: str = "disk"
    size_bytes: int = 128 * MIB
    read_only: bool = False


@dataclass
class Served:
    """A running server that exports `disks`; the first is the default export."""

    addresses: list[str]
    disks: tuple[Disk, ...]
    knows_extended_headers: bool = field(default=True, kw_only=True)
    tls: ssl.SSLContext | None = field(default=None, kw_only=True)
    """For clients, if they use TLS from the beginning."""

    @property
    def address(self) -> str:
        return self.addresses[0]

    @property
    def disk(self) -> Disk:
        return self.disks[0]

    def connected(
        self, *, flags: int | None = CLIENT_FLAGS, receive_buffer_bytes: int | None = None
    ) -> AbstractAsyncContextManager[NbdClient]:
        return connected(self.address, flags=flags, receive_buffer_bytes=receive_buffer_bytes, tls=self.tls)

    def attached(
        self,
        name: str = "",
        *,
        structured: bool = True,
        extended: bool = False,
        contexts: Sequence[str] = (),
        receive_buffer_bytes: int | None = None,
    ) -> AbstractAsyncContextManager[NbdClient]:
        return attached(
            self.address,
            name,
            structured=structured,
            extended=extended,
            contexts=contexts,
            receive_buffer_bytes=receive_buffer_bytes,
            tls=self.tls,
        )

    async def others_are_served(self) -> None:
        """Another client gets its answers."""
        async with self.attached() as other:
            await other.still_serves()


async def eventually(condition: Callable[[], bool]) -> None:
    """Return when something that only the server knows has become true."""
    async with asyncio.timeout(20):
        while True:
            if condition():
                return
            await asyncio.sleep(0.01)


def peer_command(program: str, disk: Disk, directory: Path) -> list[str]:
    """Command line of a foreign server of one disk that takes its listening socket from its parent."""
    read_only = ["-r"] if disk.read_only else []
    if program == "nbdkit":
        return [find(program), "-f", "-e", disk.name, *read_only, "memory", str(disk.size_bytes)]
    image = directory / "peer.raw"
    with image.open("wb") as file:
        file.truncate(disk.size_bytes)
    options = ["-t", "-e", "0", "-f", "raw", "--discard=unmap", "--detect-zeroes=off", *read_only]
    return [find(program), *options, "-x", "", str(image)]


@asynccontextmanager
async def serve_peer(program: str, disk: Disk, directory: Path, options: Sequence[str] = ()) -> AsyncIterator[Served]:
    """A foreign server by socket activation: the socket listens before the server runs, so nobody waits for it.
    options: further ones of the program."""
    path = directory / "peer.sock"
    name, *arguments = peer_command(program, disk, directory)
    command = [name, *options, *arguments]
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen(64)
        process = await asyncio.create_subprocess_exec(
            "/bin/sh",
            "-c",
            'exec 3<&0 0</dev/null; export LISTEN_PID=$$ LISTEN_FDS=1; exec "$@"',
            "sh",
            *command,
            stdin=listener.fileno(),
            stderr=asyncio.subprocess.DEVNULL,
        )
    try:
        yield Served([f"unix://{path}"], (disk,), knows_extended_headers=False)
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()
