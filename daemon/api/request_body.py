"""A request's body: read within a limit, decoded into a typed Struct, faults named.

Owns the way from bytes to Struct for every dialect. `read_body` runs on the event loop,
`decode_body` on the prompt thread, since a body may be megabytes long.
"""

import re
from typing import TypeVar

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request

from daemon.errors import InvalidRequest

S = TypeVar("S", bound=msgspec.Struct)

_AT = re.compile(r"(?P<what>.*?)(?: - at `(?:key in )?\$\.?(?P<path>.*)`)?", re.DOTALL)
_FIELD = re.compile(r"Object (?P<what>missing required|contains unknown) field `(?P<name>.*?)`")


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The whole body.

    Raises:
        HTTPException: 413, before more than `max_bytes` have been kept.
    """
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise HTTPException(413, f"The request body exceeds {max_bytes} bytes.")
    return bytes(body)


def decode_body(body: bytes, kind: type[S]) -> S:
    """Decode JSON into `kind`.

    Raises:
        InvalidRequest: not JSON, not an object, or a value of a wrong type; names the parameter.
    """
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise invalid(error) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"The body is not valid JSON: {error}.") from error


def keys_of(body: bytes) -> list[str]:
    """The names at the top level of a body that `decode_body` has accepted."""
    return list(msgspec.json.decode(body, type=dict[str, msgspec.Raw]))


def invalid(error: msgspec.ValidationError, prefix: str = "") -> InvalidRequest:
    """What msgspec found, as an error that names the parameter below `prefix`."""
    match = _AT.fullmatch(str(error))
    assert match is not None
    what, path = match["what"], match["path"] or ""
    field = _FIELD.fullmatch(what)
    if field is not None:
        what = "Missing required value" if "missing" in field["what"] else "Unknown value"
        path = f"{path}.{field['name']}" if path else field["name"]
    param = ".".join(part for part in (prefix, path) if part).replace(".[", "[") or None
    return InvalidRequest(f"{param}: {what}." if param else f"The body is wrong: {what}.", param)
