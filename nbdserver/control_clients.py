"""The clients of the server in the control API: who is there, and how to get rid of them."""

from typing import Final, Protocol

from nbdserver.identity import Fences, check_client
from nbdserver.operations import operation
from objstore.access.api import Clients, ClientStatus, FenceStatus, KickClient, Kicked
from objstore.errors import InvalidRequest, NotFound

FENCE_SECONDS_MAX: Final = 10 * 366 * 86400.0


class ClientsOfServer(Protocol):
    """nbdserver.server.Server."""

    def clients(self) -> list[ClientStatus]: ...
    @property
    def fences(self) -> Fences: ...
    async def kick(self, client: str, connection: int | None = None) -> int: ...
    async def fence(self, client: str, seconds: float | None) -> tuple[int, bool]: ...


class ClientOperations:
    """NBD clients, as the control API sees them."""

    def __init__(self, server: ClientsOfServer) -> None:
        self._server = server

    @operation("GET", "/v1/clients")
    async def list_clients(self) -> Clients:
        """Every NBD connection, oldest first, and the clients that are fenced."""
        fenced = self._server.fences.seconds_left()
        return Clients(
            connections=self._server.clients(),
            fenced=[FenceStatus(client=client, seconds_left=left) for client, left in fenced.items()],
        )

    @operation("POST", "/v1/clients/kick")
    async def kick_client(self, body: KickClient) -> Kicked:
        """End a client's connections, or one of them; answered when they are closed."""
        client, connection = self._find(body.client)
        if not body.fence:
            if body.seconds is not None:
                raise InvalidRequest("seconds are those of a fence")
            closed = await self._server.kick(client, connection)
            return Kicked(client=client, closed=closed, settled=True)
        if body.seconds is not None and not 0 < body.seconds <= FENCE_SECONDS_MAX:
            raise InvalidRequest(f"seconds = {body.seconds} is not possible: up to {FENCE_SECONDS_MAX:.0f} is")
        closed, settled = await self._server.fence(client, body.seconds)
        return Kicked(client=client, closed=closed, settled=settled)

    @operation("DELETE", "/v1/fences/{client}")
    async def unfence_client(self, client: str) -> None:
        """Let a fenced client in again."""
        if not self._server.fences.remove(check_client(client)):
            raise NotFound(f"{client!r} is not fenced")

    def _find(self, text: str) -> tuple[str, int | None]:
        """The client that a text means, and the connection if it is the number of one."""
        if not text.isdecimal():
            return check_client(text), None
        for one in self._server.clients():
            if one.connection == int(text):
                return one.client, one.connection
        raise NotFound(f"there is no connection {text}")
