"""What one dialect does with every name a client may put at the top level of a body.

Owns the rule that nothing is ignored in silence: a name is honoured (a field of the dialect's
Struct), accepted without effect on purpose, refused with an error that names it, or, when it means
nothing to this server, named in the response's header. docs/parameters.md is made from the same.
Pure; runs on the prompt thread.
"""

import typing
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
from msgspec import Meta, Struct, inspect

from daemon.errors import InvalidRequest

IGNORED_HEADER = "x-qwend-ignored"
"""Names what in the request means nothing to this server."""

MAX_HEADER = 1000


def doc(text: str) -> Meta:
    """What a field means here, for the table and the OpenAPI description."""
    return Meta(description=text)


class Parameters(Struct, frozen=True, kw_only=True):
    """One endpoint's names. Reasons are half sentences that follow the name."""

    path: str
    request: type[Struct]
    no_ops: Mapping[str, str]
    refused: Mapping[str, str]

    def check(self, body: bytes) -> tuple[str, ...]:
        """The names that mean nothing here, those inside option objects as `outer.inner`.

        Args:
            body: one that decodes as `request`.

        Raises:
            InvalidRequest: a refused name with a value that is not null, false, 0 or empty.
        """
        values = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
        ignored = []
        for name in _unknown(values, self.request, ""):
            if name in self.refused:
                if msgspec.json.decode(values[name]):
                    raise InvalidRequest(f"{name}: {self.refused[name]}.", name)
            elif name not in self.no_ops:
                ignored.append(name)
        return tuple(ignored)

    def honoured(self) -> Iterator[tuple[str, str]]:
        """Every field with its meaning."""
        hints = typing.get_type_hints(self.request, include_extras=True)
        for field in msgspec.structs.fields(self.request):
            yield field.encode_name, _description(hints[field.name])


def ignored_header(names: tuple[str, ...]) -> dict[str, str]:
    """The header that names them; none when there are none."""
    if not names:
        return {}
    return {IGNORED_HEADER: ", ".join(map(_shown, names))[:MAX_HEADER].rstrip(" ,")}


def _shown(name: str) -> str:
    """A name that may stand in a header; a client can make up any."""
    is_plain = name.isascii() and name.isprintable() and name == name.strip()
    return name if name and is_plain else "?"


def _unknown(values: Mapping[str, msgspec.Raw], kind: type[Struct], where: str) -> Iterator[str]:
    fields = {field.encode_name: field for field in msgspec.structs.fields(kind)}
    for name, value in values.items():
        if name not in fields:
            yield where + name
            continue
        options = _option_struct(fields[name].type)
        if options is not None and bytes(value).startswith(b"{"):
            inner = msgspec.json.decode(value, type=dict[str, msgspec.Raw])
            yield from _unknown(inner, options, f"{where}{name}.")


def _option_struct(hint: Any) -> type[Struct] | None:
    """The Struct of a field that holds one object of options, or None."""
    kind = inspect.type_info(hint)
    kind = kind.type if isinstance(kind, inspect.Metadata) else kind
    members = kind.types if isinstance(kind, inspect.UnionType) else (kind,)
    structs = [member.cls for member in members if isinstance(member, inspect.StructType)]
    return structs[0] if len(structs) == 1 else None


def _description(hint: Any) -> str:
    notes = (note for note in getattr(hint, "__metadata__", ()) if isinstance(note, Meta))
    return next((note.description for note in notes if note.description), "")
