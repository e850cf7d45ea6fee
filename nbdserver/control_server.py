"""The server itself in the control API: reading its configuration again."""

from collections.abc import Awaitable, Callable

from nbdserver.operations import operation
from objstore.access.api import Reloaded


class ServerOperations:
    """What can be asked of the process. reload: see nbdserver.service.Reloader."""

    def __init__(self, reload: Callable[[], Awaitable[list[str]]]) -> None:
        self._reload = reload

    @operation("POST", "/v1/reload")
    async def reload_configuration(self) -> Reloaded:
        """Read the configuration again; clients stay. What is wrong with it is an error, and the old one stays."""
        return Reloaded(restart_needed=await self._reload())
