"""The control API's description is made from the handlers' types; each operation is called as it says."""

import asyncio
import http.client
import json
import os
import socket
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import aiohttp
import pytest

from nbdserver.control import ControlServer
from nbdserver.control_clients import ClientOperations
from nbdserver.server import Server
from objstore.access.api import ServerStatus
from objstore.units import MIB
from objstore.volume.settings import StoreSettings
from objstore.volume.store import Store, open_store

SESSION, HANDLE, IMPORT = "the session", "a handle", "an import's handle"
"""Stand for the names that the server gives."""
EXAMPLES: dict[str, dict[str, Any]] = {
    "create_vdi": {"body": {"name": "new", "size_bytes": MIB}},
    "get_vdi": {"name": "disk"},
    "delete_vdi": {"name": "disk"},
    "get_damage": {"name": "disk"},
    "list_snapshots_of": {"name": "disk"},
    "create_snapshot": {"name": "disk", "body": {"tag": "new", "skip_unchanged": False}},
    "clone": {"body": {"source": "disk", "name": "copy", "copies": 1}},
    "rename": {"name": "spare", "body": {"name": "other"}},
    "resize": {"name": "disk", "body": {"size_bytes": 8 * MIB}},
    "rollback": {"name": "third@old", "force": "true"},
    "resume": {"name": "third"},
    "get_snapshot": {"name": "disk@old"},
    "protect_snapshot": {"name": "disk@old", "body": {"protected": False}},
    "delete_snapshot": {"name": "disk@old"},
    "create_group_snapshot": {"body": {"names": ["disk", "kept"], "tag": "group"}},
    "get_snapshot_space": {"name": "disk@old"},
    "undelete": {"name": "gone", "body": {"name": "back", "vdi_id": None}},
    "purge": {"name": "away"},
    "set_copies": {"name": "disk", "body": {"copies": 1}},
    "set_limits": {"name": "disk", "body": {"limits": {"iops": {"rate": 500, "burst": 1000}}}},
    "set_recovery_rate": {"body": {"bytes_per_second_max": MIB}},
    "kick_client": {"body": {"client": "uid:7", "fence": True, "seconds": 60.0}},
    "unfence_client": {"client": "uid:7"},
    "change_zones": {"body": {"action": "set-weight", "zone": "0", "weight": 2.0}},
    "list_attributes": {"name": "disk"},
    "get_attribute": {"name": "disk", "key": "kept"},
    "set_attribute": {"name": "disk", "key": "new/%2F", "exclusive": "true", "body": b"\0value"},
    "delete_attribute": {"name": "disk", "key": "kept"},
    "allocate_range": {"name": "disk", "body": {"offset_bytes": 0, "length_bytes": 8192}},
    "flatten": {"name": "copy"},
    "get_job": {"job_id": 1},
    "abort_job": {"job_id": 1},
    "open_handle": {"name": "disk", "body": {"session": SESSION}},
    "read_data": {"handle": HANDLE, "offset_bytes": 1, "length_bytes": 5000},
    "write_data": {"handle": HANDLE, "offset_bytes": 1, "writeback": "false", "body": b"data"},
    "zero_range": {"handle": HANDLE, "body": {"offset_bytes": 0, "length_bytes": 5000, "no_hole": True}},
    "discard_range": {"handle": HANDLE, "body": {"offset_bytes": 0, "length_bytes": 8192}},
    "flush_handle": {"handle": HANDLE},
    "list_extents": {"handle": HANDLE, "offset_bytes": 0, "length_bytes": 8192},
    "list_changes": {"handle": HANDLE, "since": HANDLE, "offset_bytes": 0, "length_bytes": 8192},
    "begin_import": {
        "name": "imported",
        "body": {"session": SESSION, "base": "", "identity": "a:1", "size_bytes": MIB},
    },
    "finish_import": {"handle": IMPORT, "body": {"tag": "t"}},
    "close_handle": {"handle": HANDLE},
}
"""What each operation is called with: path and query parameters by name, and `body`."""


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    settings = StoreSettings(trash_days=1.0)
    store = await open_store([tmp_path / "a", tmp_path / "b"], settings=settings, create=True)
    await store.create_vdi("kept", MIB)
    for name in ("gone", "away"):
        await store.create_vdi(name, MIB)
        await store.delete_vdi(name)
    await store.create_vdi("disk", 4 * MIB)
    await store.attributes.set("disk", "kept", b"value")

    async def slow(offset: int, length: int) -> int:
        await asyncio.sleep(0.001)
        return 1

    await store.jobs.start("allocate", "disk", 0, 1 << 40, slow)
    for name in ("spare", "third"):
        await store.create_vdi(name, MIB)
    await store.create_snapshot("third", "old")
    await store.create_snapshot("disk", "old")
    yield store
    await store.shutdown()


@pytest.fixture
async def control(store: Store) -> AsyncIterator[Path]:
    with tempfile.TemporaryDirectory(prefix="sheepfold-") as directory:
        path = Path(directory) / "control.sock"
        clients = ClientOperations(Server(store))
        server = ControlServer(store, lambda: ServerStatus(pid=1, listen=[], clients=0), [clients])
        await server.start(path)
        yield path
        await server.stop()


def ask(path: Path, method: str, target: str, body: bytes | None, kind: str) -> tuple[int, str, bytes]:
    """Status, content type and body of one answer."""
    connection = http.client.HTTPConnection("localhost")
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(os.fspath(path))
    try:
        connection.request(method, target, body, {"Content-Type": kind} if body is not None else {})
        response = connection.getresponse()
        return response.status, response.headers.get("Content-Type", ""), response.read()
    finally:
        connection.close()


async def description(path: Path) -> dict[str, Any]:
    status, kind, body = await asyncio.to_thread(ask, path, "GET", "/v1/openapi.json", None, "")
    assert (status, kind) == (200, "application/json")
    found: dict[str, Any] = json.loads(body)
    return found


def fits(value: Any, schema: dict[str, Any], root: dict[str, Any]) -> bool:
    """Whether a value is what a schema of the kinds that are used here says, all of its members included."""
    if "$ref" in schema:
        return fits(value, root["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]], root)
    if "anyOf" in schema:
        return any(fits(value, one, root) for one in schema["anyOf"])
    if not schema:
        return True
    kind = schema["type"]
    if kind == "object":
        properties = schema.get("properties", {})
        return isinstance(value, dict) and (
            value.keys() >= set(schema.get("required", ()))
            and all(name in properties and fits(value[name], properties[name], root) for name in value)
            if properties
            else isinstance(value, dict)
        )
    if kind == "array":
        return isinstance(value, list) and all(fits(one, schema.get("items", {}), root) for one in value)
    plain = {"string": str, "integer": int, "number": int | float, "boolean": bool, "null": type(None)}[kind]
    return isinstance(value, plain)


def named(value: Any, names: dict[str, str]) -> Any:
    """A value with the server's names in the place of those that stand for them."""
    if isinstance(value, dict):
        return {key: named(one, names) for key, one in value.items()}
    return names.get(value, value) if isinstance(value, str) else value


@asynccontextmanager
async def begun_session(path: Path, api: dict[str, Any]) -> AsyncIterator[str]:
    """The one operation that is a WebSocket."""
    found = api["paths"]["/v1/session"]["get"]
    assert found["operationId"] == "open_session"
    (schema,) = found["responses"]["101"]["content"].values()
    connector = aiohttp.UnixConnector(os.fspath(path))
    async with (
        aiohttp.ClientSession("http://localhost", connector=connector) as http,
        http.ws_connect("/v1/session") as socket,
    ):
        answer = json.loads(await socket.receive_str())
        assert fits(answer, schema["schema"], api)
        yield answer["session"]


async def call(path: Path, api: dict[str, Any], name: str, given: dict[str, Any]) -> Any:
    """Call an operation as the description says; checks the answer against it."""
    ((target, method, found),) = (
        (target, method, found)
        for target, methods in api["paths"].items()
        for method, found in methods.items()
        if found["operationId"] == name
    )
    query = {}
    for parameter in found.get("parameters", ()):
        if parameter["in"] == "path":
            target = target.replace(f"{{{parameter['name']}}}", quote(str(given[parameter["name"]]), safe=""))
        elif parameter["name"] in given:
            query[parameter["name"]] = given[parameter["name"]]
        else:
            assert not parameter["required"], f"{name} needs {parameter['name']}"
    if query:
        target += "?" + urlencode(query)
    body, kind = None, ""
    if "requestBody" in found:
        ((kind, content),) = found["requestBody"]["content"].items()
        body = given["body"]
        if kind == "application/json":
            assert fits(body, content["schema"], api)
            body = json.dumps(body).encode()
    status, got_kind, answer = await asyncio.to_thread(ask, path, method.upper(), target, body, kind)
    (described,) = (code for code in found["responses"] if code != "default")
    assert str(status) == described, answer
    content = found["responses"][described].get("content")
    if content is None:
        assert answer == b""
        return None
    ((wanted_kind, schema),) = content.items()
    assert got_kind == wanted_kind
    if wanted_kind != "application/json":
        return answer
    assert fits(json.loads(answer), schema["schema"], api), answer
    return json.loads(answer)


async def operation_names(path: Path) -> list[str]:
    api = await description(path)
    return [found["operationId"] for methods in api["paths"].values() for found in methods.values()]


async def test_each_operation_is_called_as_described(control: Path) -> None:
    api = await description(control)
    names = await operation_names(control)
    assert len(names) == len(set(names))
    assert set(EXAMPLES) <= set(names), "an example of an operation that does not exist"
    names.remove("open_session")
    names.sort(
        key=lambda name: (name == "delete_vdi", name.startswith("delete_"), name == "close_handle")
    )  # last: others need them
    async with begun_session(control, api) as session:
        opened = await call(control, api, "open_handle", named(EXAMPLES["open_handle"], {SESSION: session}))
        known = {SESSION: session, HANDLE: opened["handle"]}
        begun = await call(control, api, "begin_import", named(EXAMPLES["begin_import"], known))
        known[IMPORT] = begun["handle"]
        names.remove("open_handle")
        names.remove("begin_import")
        for name in names:
            await call(control, api, name, named(EXAMPLES.get(name, {}), known))


async def test_every_reference_leads_somewhere_and_every_operation_has_a_summary(control: Path) -> None:
    api = await description(control)
    assert api["openapi"].startswith("3.1")
    for part in json.dumps(api).split('"$ref": "')[1:]:
        assert part.partition('"')[0].rsplit("/", 1)[1] in api["components"]["schemas"]
    for methods in api["paths"].values():
        for found in methods.values():
            assert found["summary"].endswith(".") or "; " in found["summary"], found["operationId"]
            assert "ErrorReply" in json.dumps(found["responses"]["default"])


async def test_what_the_description_does_not_know_is_refused(control: Path) -> None:
    status, _, body = await asyncio.to_thread(ask, control, "GET", "/v1/vdis?colour=red", None, "")
    assert status == 400
    assert b"'colour'" in body


def test_the_judge_of_answers_can_say_no() -> None:
    root: dict[str, Any] = {"components": {"schemas": {}}}
    record = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    assert fits({"a": 1}, record, root)
    for wrong in ({}, {"a": "1"}, {"a": 1, "b": 2}, [], None):
        assert not fits(wrong, record, root)
    assert not fits([1, "x"], {"type": "array", "items": {"type": "integer"}}, root)
    assert not fits(None, {"anyOf": [{"type": "string"}, {"type": "number"}]}, root)
