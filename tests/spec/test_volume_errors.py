"""What a failing volume becomes on the wire: proto.md, "Error values", NBD_CMD_READ "Structured replies"."""

import errno
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from objstore.errors import (
    Busy,
    Corrupt,
    Fenced,
    InvalidRequest,
    NoSpace,
    NotFound,
    ReadOnly,
    Stopping,
    StoreError,
    Unavailable,
)
from objstore.volume.base import Volume
from objstore.volume.memory import MemorySource
from tests.conftest import ExpectedWarnings
from tests.support.nbd_client import NbdClient
from tests.support.nbd_spec import STRING_BYTES_MAX, ChunkType, Command, CommandFlag, Err, Option
from tests.support.our_server import serve_source, serve_volume
from tests.support.scripted_volume import ScriptedVolume
from tests.support.serving import MIB, Disk, Served

PAGE = 4096
COMMANDS = [
    Command.READ,
    Command.WRITE,
    Command.FLUSH,
    Command.TRIM,
    Command.WRITE_ZEROES,
    Command.BLOCK_STATUS,
]
ERRORS = [
    (NoSpace("zones are full"), Err.ENOSPC),
    (Unavailable("too few zones"), Err.EIO),
    (ReadOnly("a snapshot"), Err.EPERM),
    (InvalidRequest("no"), Err.EINVAL),
    (NotFound("gone"), Err.EIO),
    (Corrupt("everything", [(0, PAGE)]), Err.EIO),
]


@pytest.fixture
async def volume() -> ScriptedVolume:
    return ScriptedVolume()


@pytest.fixture
async def served(volume: ScriptedVolume, tmp_path: Path) -> AsyncIterator[Served]:
    async with serve_volume(volume, tmp_path) as served:
        yield served


@pytest.fixture(params=["simple", "structured", "extended"])
async def failing(served: Served, request: pytest.FixtureRequest) -> AsyncIterator[NbdClient]:
    """In transmission, once with each kind of reply."""
    structured, extended = request.param == "structured", request.param == "extended"
    contexts = [] if request.param == "simple" else ["base:allocation"]
    async with served.attached(structured=structured, extended=extended, contexts=contexts) as client:
        yield client


async def call(client: NbdClient, command: Command, flags: int = 0) -> Err:
    if command == Command.WRITE:
        return (await client.call(command, 0, payload=b"w" * PAGE, flags=flags)).error
    return (await client.call(command, 0, 0 if command == Command.FLUSH else PAGE, flags=flags)).error


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("failure", "error"), ERRORS, ids=[type(failure).__name__ for failure, _ in ERRORS])
async def test_errors_of_the_volume(
    volume: ScriptedVolume, failing: NbdClient, command: Command, failure: StoreError, error: Err
) -> None:
    """Each failure becomes an allowed error value (checked by the client); the connection goes on."""
    if command == Command.BLOCK_STATUS and not failing.contexts:
        error = Err.EINVAL
    volume.failure = failure
    assert await call(failing, command) == error
    volume.failure = None
    await failing.still_serves()


@pytest.mark.parametrize("command", [Command.WRITE, Command.TRIM, Command.WRITE_ZEROES])
async def test_errors_with_fua(volume: ScriptedVolume, failing: NbdClient, command: Command) -> None:
    """NBD_CMD_FLAG_FUA: no success over a failure, and nothing of the failed command is seen."""
    volume.failure = Unavailable("too few zones")
    assert await call(failing, command, CommandFlag.FUA) == Err.EIO
    volume.failure = None
    assert await failing.read(0, PAGE) == bytes(PAGE)


async def test_fenced_volume_ends_the_connection(volume: ScriptedVolume, failing: NbdClient) -> None:
    """A volume that another server owns now: NBD_EIO, then the connection closes, for its handle stays dead."""
    volume.failure = Fenced("epoch 7 owns it")
    assert await call(failing, Command.WRITE) == Err.EIO
    await failing.expect_close()


async def test_stopping_volume_closes_without_a_reply(volume: ScriptedVolume, failing: NbdClient) -> None:
    """A volume that is being closed: never an error reply, the connection ends and its client tries again."""
    volume.failure = Stopping("the store is closing")
    await failing.submit(Command.WRITE, 0, payload=b"w" * PAGE)
    await failing.expect_close()


async def test_our_own_bug_is_eio(
    volume: ScriptedVolume, failing: NbdClient, expected_warnings: ExpectedWarnings
) -> None:
    """An exception that nobody planned becomes NBD_EIO and a log record, and harms no other request."""
    expected_warnings.allow(".")
    volume.failure = ZeroDivisionError("a bug")
    assert await call(failing, Command.WRITE) == Err.EIO
    volume.failure = OSError(errno.ENOENT, "a bug as well")
    assert await call(failing, Command.READ) == Err.EIO
    volume.failure = None
    await failing.still_serves()


async def test_error_texts_are_bounded(volume: ScriptedVolume, served: Served) -> None:
    """NBD_REPLY_TYPE_ERROR: the message MUST NOT exceed 4096 bytes and is UTF-8 without NUL (checked by the client)."""
    texts = ["x" * 100_000, "ü" * 4096, "nul \0 inside", "\N{GRINNING FACE}" * 5000, ""]
    async with served.attached() as client:
        for text in texts:
            volume.failure = NoSpace(text)
            reply = await client.call(Command.READ, 0, PAGE)
            assert reply.error == Err.ENOSPC
            assert len(reply.errors[0].message.encode()) <= STRING_BYTES_MAX


async def test_error_text_reaches_the_client(volume: ScriptedVolume, served: Served) -> None:
    """ "Structured reply chunk message": errors SHOULD come with a text for people."""
    async with served.attached() as client:
        volume.failure = Unavailable("two of three zones are missing")
        reply = await client.call(Command.READ, 0, PAGE)
        assert "two of three zones are missing" in reply.errors[0].message


class RefusingSource(MemorySource):
    """A source whose volumes are listed but can't be opened."""

    failure: StoreError = Unavailable("")

    async def open(self, name: str) -> Volume:
        raise self.failure


@pytest.mark.parametrize(
    "failure", [Unavailable("zones missing"), Busy("locked"), Corrupt("damaged"), NotFound("gone")]
)
async def test_errors_at_opening(tmp_path: Path, failure: StoreError, expected_warnings: ExpectedWarnings) -> None:
    """A volume that can't be opened: an error reply with its reason to NBD_OPT_GO, and haggling goes on."""
    expected_warnings.allow("can't be opened")
    source = RefusingSource({"disk": ScriptedVolume()})
    source.failure = failure
    async with serve_source(source, [Disk()], tmp_path) as served:
        async with served.connected() as client:
            info = await client.go()
            assert not info.accepted
            assert str(failure) in info.message
            await client.in_step()
        async with served.connected() as client:
            await client.send_option(Option.EXPORT_NAME)
            await client.expect_close()


DAMAGE = {
    "in the middle": ([(2 * PAGE, PAGE)], 0, 8 * PAGE),
    "at the start": ([(0, PAGE)], 0, 8 * PAGE),
    "at the end": ([(7 * PAGE, PAGE)], 0, 8 * PAGE),
    "two places": ([(PAGE, PAGE), (5 * PAGE, 2 * PAGE)], 0, 8 * PAGE),
    "everywhere": ([(0, 16 * PAGE)], 0, 8 * PAGE),
    "cut by the request": ([(2 * PAGE, PAGE)], 2 * PAGE + 100, 3 * PAGE),
    "next to a hole": ([(20 * PAGE, PAGE)], 10 * PAGE, 20 * PAGE),
    "a megabyte": ([(MIB, PAGE), (3 * MIB, 5 * PAGE)], 100, 4 * MIB),
}


@pytest.mark.parametrize("extended", [False, True], ids=["structured", "extended"])
@pytest.mark.parametrize(("damage", "offset", "length"), DAMAGE.values(), ids=DAMAGE.keys())
async def test_read_over_damage_sends_the_good_parts(
    volume: ScriptedVolume,
    served: Served,
    damage: list[tuple[int, int]],
    offset: int,
    length: int,
    extended: bool,
) -> None:
    """NBD_REPLY_TYPE_ERROR_OFFSET: everything outside of the damage arrives, and the damage is named by its offset."""
    async with served.attached(extended=extended) as client:
        await client.write(0, bytes(range(256)) * 16 * 10)
        await client.write(MIB - PAGE, b"m" * (2 * MIB + 100))
        model = await client.read(offset, length)
        volume.damage = damage
        reply = await client.call(Command.READ, offset, length)
    good, position = [], 0
    for start, size in damage:
        start, stop = max(start - offset, 0), min(start + size - offset, length)
        good.append((position, start))
        position = stop
    good.append((position, length))
    assert {failure.error for failure in reply.errors} == {Err.EIO}
    assert [failure.offset_bytes for failure in reply.errors] == [max(start, offset) for start, _ in damage]
    trusted = bytearray(length)
    for begin, end in reply.valid_ranges():
        trusted[begin:end] = b"\1" * (end - begin)
        assert reply.data[begin:end] == model[begin:end]
    wanted = bytearray(length)
    for begin, end in good:
        wanted[begin:end] = b"\1" * (end - begin)
    assert trusted == wanted


async def test_read_over_damage_with_df(volume: ScriptedVolume, served: Served) -> None:
    """NBD_CMD_FLAG_DF: at most one content chunk (checked by the client), with or without errors behind it."""
    async with served.attached() as client:
        await client.write(0, b"g" * 4 * PAGE)
        volume.damage = [(PAGE, PAGE)]
        reply = await client.call(Command.READ, 0, 4 * PAGE, flags=CommandFlag.DF)
        assert reply.error == Err.EIO
        assert all(bytes(reply.data[begin:end]) == b"g" * (end - begin) for begin, end in reply.valid_ranges())
        content = [chunk for chunk in reply.chunks if chunk.type == ChunkType.OFFSET_DATA]
        assert all(b"\xdb" not in chunk.payload[8 : 8 + PAGE] for chunk in content)


async def test_read_over_damage_as_simple_reply(volume: ScriptedVolume, served: Served) -> None:
    """ "Simple replies": an error without any payload, and the connection goes on."""
    async with served.attached(structured=False) as client:
        await client.write(0, b"g" * 4 * PAGE)
        volume.damage = [(PAGE, PAGE)]
        reply = await client.call(Command.READ, 0, 4 * PAGE)
        assert reply.error == Err.EIO
        assert not reply.data
        assert await client.read(2 * PAGE, PAGE) == b"g" * PAGE


async def test_damaged_bytes_are_never_sent_as_data(volume: ScriptedVolume, served: Served) -> None:
    """What a damaged block holds goes to nobody: not even as bytes that an error chunk then disowns."""
    async with served.attached() as client:
        await client.write(0, b"g" * 8 * PAGE)
        volume.damage = [(2 * PAGE, PAGE), (5 * PAGE, PAGE)]
        reply = await client.call(Command.READ, 0, 8 * PAGE)
        assert reply.error == Err.EIO
        assert b"\xdb" not in reply.data
