"""A little of QEMU's control protocol: commands, their answers, events."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tests.support.clients import running
from tests.support.serving import eventually

SECONDS_MAX = 60.0


class Qmp:
    """One connection to a QEMU."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._events: list[dict[str, Any]] = []

    async def ask(self, command: str, **arguments: Any) -> Any:
        """What it returns. Its error fails the test."""
        self._writer.write(json.dumps({"execute": command, "arguments": arguments}).encode())
        while True:
            message = await self._message()
            if "event" in message:
                self._events.append(message)
                continue
            assert "return" in message, f"{command} {arguments}: {message}"
            return message["return"]

    async def event(self, name: str) -> dict[str, Any]:
        """The data of the next event of that name."""
        while True:
            while self._events:
                message = self._events.pop(0)
                if message["event"] == name:
                    data: dict[str, Any] = message.get("data", {})
                    return data
            self._events.append(await self._message())

    async def _message(self) -> dict[str, Any]:
        async with asyncio.timeout(SECONDS_MAX):
            line = await self._reader.readline()
        assert line, "QEMU has ended"
        message: dict[str, Any] = json.loads(line)
        return message


@asynccontextmanager
async def qemu_without_machine(directory: Path) -> AsyncIterator[Qmp]:
    """A QEMU that does nothing but what it is asked over QMP. directory: for its socket, short."""
    path = directory / "qmp"
    arguments = ("-machine", "none", "-nodefaults", "-display", "none", "-qmp", f"unix:{path},server=on,wait=off")
    async with running("qemu-system-x86_64", *arguments):
        await eventually(path.exists)
        reader, writer = await asyncio.open_unix_connection(path)
        try:
            qmp = Qmp(reader, writer)
            await qmp._message()  # its greeting
            await qmp.ask("qmp_capabilities")
            yield qmp
        finally:
            writer.close()
            await writer.wait_closed()
