"""Operations of the control API: what a handler's own types say about its request, its answer and its description.

A handler is a method marked with `operation`. Its parameters tell where they come from: one that stands in the path's
braces is part of the path, `request` is the request itself, `body` is a JSON record, every other one is a query
parameter. What it returns is the answer: None = no body (204), bytes = as they are, a record = JSON.
"""

import inspect
import types
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Final, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec
from aiohttp import web

from objstore.access.api import ErrorReply
from objstore.errors import InvalidRequest
from objstore.version import VERSION

BINARY: Final = "application/octet-stream"
JSON: Final = "application/json"
_SCHEMAS: Final = "#/components/schemas/{name}"
_MARK: Final = "__operation__"

H = TypeVar("H", bound=Callable[..., Awaitable[Any]])


class Operation(NamedTuple):
    """One method of one path. kind: type of the answer, None = no body. binary_body: the handler reads the request's
    body itself."""

    method: str
    path: str
    name: str
    status: int
    summary: str
    in_path: dict[str, Any]
    in_query: dict[str, Any]
    optional: frozenset[str]
    body: Any
    binary_body: bool
    kind: Any
    takes_request: bool


def operation(
    method: str, path: str, *, status: int = 0, answer: Any = None, binary_body: bool = False
) -> Callable[[H], H]:
    """Mark a handler. status: of a good answer (default 200, or 204 for None). answer: what a handler that returns a
    response of its own puts into it. binary_body: it reads such a body from its `request`."""

    def mark(handler: H) -> H:
        hints = get_type_hints(handler)
        parameters = inspect.signature(handler).parameters
        kind = answer if answer is not None else hints.pop("return")
        hints.pop("return", None)
        in_path = {name: hint for name, hint in hints.items() if f"{{{name}}}" in path}
        in_query = {name: hint for name, hint in hints.items() if name not in ("request", "body", *in_path)}
        kind = None if kind is type(None) else kind
        found = Operation(
            method,
            path,
            handler.__name__.lstrip("_"),
            status or (204 if kind is None else 200),
            (inspect.getdoc(handler) or "").partition("\n\n")[0].replace("\n", " "),
            in_path,
            in_query,
            frozenset(name for name in in_query if parameters[name].default is not inspect.Parameter.empty),
            hints.get("body"),
            binary_body,
            kind,
            "request" in hints,
        )
        setattr(handler, _MARK, found)
        return handler

    return mark


def operations(owner: object) -> Iterator[tuple[Operation, Callable[..., Awaitable[Any]]]]:
    """The marked handlers of an object, in the order of their definition."""
    for name, value in vars(type(owner)).items():
        found = getattr(value, _MARK, None)
        if found is not None:
            yield found, getattr(owner, name)


def route(found: Operation, handler: Callable[..., Awaitable[Any]]) -> web.RouteDef:
    """The operation as aiohttp serves it."""

    async def serve(request: web.Request) -> web.StreamResponse:
        given: dict[str, Any] = {"request": request} if found.takes_request else {}
        for name, hint in found.in_path.items():
            given[name] = _converted(name, request.match_info[name], hint)
        unknown = sorted(set(request.query) - set(found.in_query))
        if unknown:
            raise InvalidRequest(
                f"there is no query parameter {unknown[0]!r}; there are {', '.join(found.in_query) or 'none'}"
            )
        for name, hint in found.in_query.items():
            if name in request.query:
                given[name] = _converted(name, request.query[name], hint)
            elif name not in found.optional:
                raise InvalidRequest(f"the query parameter {name!r} is missing")
        if found.body is not None:
            given["body"] = await _body(request, found.body)
        return _response(await handler(**given), found.status)

    return web.route(found.method, found.path, serve)


def _response(answer: Any, status: int) -> web.StreamResponse:
    if isinstance(answer, web.StreamResponse):
        return answer
    if answer is None:
        return web.Response(status=status)
    if isinstance(answer, bytes | bytearray | memoryview):
        return web.Response(body=answer, status=status, content_type=BINARY)
    return web.Response(body=msgspec.json.encode(answer), status=status, content_type=JSON)


def _converted(name: str, text: str, kind: Any) -> Any:
    """A path or query parameter. InvalidRequest."""
    try:
        return msgspec.convert(text, type=kind, strict=False)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"parameter {name} = {text!r}: {error}") from error


async def _body(request: web.Request, kind: Any) -> Any:
    """The request's JSON body. InvalidRequest."""
    try:
        return msgspec.json.decode(await request.read(), type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"request body: {error}") from error


def describe(all_operations: list[Operation]) -> dict[str, Any]:
    """The OpenAPI 3.1 document of these operations."""
    kinds: list[Any] = [ErrorReply]
    for found in all_operations:
        kinds += [kind for kind in (found.body, found.kind) if kind is not None and kind is not bytes]
    schemas, components = msgspec.json.schema_components(kinds, ref_template=_SCHEMAS)
    schema_of = dict(zip(map(repr, kinds), schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for found in all_operations:
        paths.setdefault(found.path, {})[found.method.lower()] = _described(found, schema_of)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Sheepfold control API", "version": VERSION},
        "paths": paths,
        "components": {"schemas": components},
    }


def _described(found: Operation, schema_of: dict[str, Any]) -> dict[str, Any]:
    described: dict[str, Any] = {"operationId": found.name, "summary": found.summary}
    parameters = [_parameter(name, hint, "path", required=True) for name, hint in found.in_path.items()]
    parameters += [
        _parameter(name, hint, "query", required=name not in found.optional) for name, hint in found.in_query.items()
    ]
    if parameters:
        described["parameters"] = parameters
    if found.body is not None:
        described["requestBody"] = {"required": True, "content": {JSON: {"schema": schema_of[repr(found.body)]}}}
    elif found.binary_body:
        described["requestBody"] = {"required": True, "content": {BINARY: {}}}
    good: dict[str, Any] = {"description": "done"}
    if found.kind is bytes:
        good["content"] = {BINARY: {}}
    elif found.kind is not None:
        good["content"] = {JSON: {"schema": schema_of[repr(found.kind)]}}
    wrong = {"description": "an error", "content": {JSON: {"schema": schema_of[repr(ErrorReply)]}}}
    described["responses"] = {str(found.status): good, "default": wrong}
    return described


def _parameter(name: str, hint: Any, place: str, *, required: bool) -> dict[str, Any]:
    if get_origin(hint) in (Union, types.UnionType):
        (hint,) = (kind for kind in get_args(hint) if kind is not type(None))
    return {"name": name, "in": place, "required": required, "schema": msgspec.json.schema(hint)}
