"""The form that a client asks a reply to have, under the names of several servers.

Owns the Structs of formats and tool choices, and their translation into a Guide. Any dialect's.
Pure; runs on the prompt thread.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Struct

from daemon.api.parameters import doc
from daemon.api.request_body import invalid
from daemon.api.sampling_fields import SamplingFields
from daemon.api.tool_definitions import check_schema
from daemon.errors import InvalidRequest
from daemon.text.messages import ToolSpec
from daemon.text.reply_grammar import ContentForm, Guide

MAX_FORM_CHARACTERS = 512 * 1024

GRAMMAR = doc("GBNF as llama-server takes it, or Lark: the content follows it")
AS_FORMAT = doc("a JSON schema: as in response_format")


class JsonSchemaFormat(Struct):
    """`name` and `description` are for people; the schema is held whether `strict` or not."""

    schema: dict[str, Any] | bool = True
    name: str = ""
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Struct):
    """OpenAI's; `schema` beside the type is llama-server's."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None
    schema: dict[str, Any] | None = None


class StructuredOutputs(Struct):
    """vLLM's."""

    json: dict[str, Any] | str | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class GuidedFields(SamplingFields, kw_only=True):
    """Part of a body: the form of the content. One of them at most."""

    grammar: Annotated[str | None, GRAMMAR] = None
    json_schema: Annotated[dict[str, Any] | None, AS_FORMAT] = None
    guided_json: Annotated[dict[str, Any] | str | None, AS_FORMAT] = None
    guided_regex: Annotated[str | None, doc("the whole content matches it")] = None
    guided_choice: Annotated[list[str] | None, doc("the content is one of them")] = None
    guided_grammar: Annotated[str | None, GRAMMAR] = None
    structured_outputs: Annotated[
        StructuredOutputs | None, doc("vLLM's object: json, regex, choice, grammar or json_object")
    ] = None


class ToolChoice(Struct, frozen=True):
    """Which tools a reply may call: with `names` only those; "required": at least one call."""

    mode: Literal["auto", "none", "required"] = "auto"
    names: tuple[str, ...] | None = None


def content_form(
    fields: GuidedFields, response_format: ResponseFormat | None
) -> ContentForm | None:
    """The form of the content, if a client asks for one.

    Raises:
        InvalidRequest: two at once, or one that cannot be read.
    """
    own = fields.structured_outputs or StructuredOutputs()
    forms = [
        _response_form(response_format),
        _form("grammar", fields.grammar, "grammar"),
        _form("json", fields.json_schema, "json_schema"),
        _form("json", fields.guided_json, "guided_json"),
        _form("regex", fields.guided_regex, "guided_regex"),
        _form("choice", fields.guided_choice, "guided_choice"),
        _form("grammar", fields.guided_grammar, "guided_grammar"),
        _form("json", own.json, "structured_outputs.json"),
        _form("regex", own.regex, "structured_outputs.regex"),
        _form("choice", own.choice, "structured_outputs.choice"),
        _form("grammar", own.grammar, "structured_outputs.grammar"),
        json_object("structured_outputs.json_object") if own.json_object else None,
    ]
    given = [form for form in forms if form is not None]
    if len(given) > 1:
        names = f"{given[0].param} and {given[1].param}"
        raise InvalidRequest(f"{names}: a reply can have one form only.", given[1].param)
    return given[0] if given else None


def json_object(param: str) -> ContentForm:
    """Any JSON object."""
    return ContentForm("json", {"type": "object"}, param)


def json_schema_form(schema: object, param: str) -> ContentForm:
    """What a JSON schema allows.

    Raises:
        InvalidRequest: it is no JSON schema in form, or too large.
    """
    check_schema(schema, param)
    if len(msgspec.json.encode(schema)) > MAX_FORM_CHARACTERS:
        raise InvalidRequest(f"{param}: is larger than {MAX_FORM_CHARACTERS} bytes.", param)
    return ContentForm("json", {} if schema is True else schema, param)


def read_tool_choice(value: object, tools: Sequence[ToolSpec]) -> ToolChoice:
    """OpenAI's `tool_choice`, as chat or Responses clients write it.

    Raises:
        InvalidRequest: a choice that does not exist, or a tool that is not offered.
    """
    choice = _choice_of(value)
    offered = {tool.name for tool in tools}
    for name in choice.names or ():
        if name not in offered:
            raise InvalidRequest(f"tool_choice: there is no tool named {name!r}.", "tool_choice")
    if choice.mode == "required" and not tools:
        raise InvalidRequest("tool_choice: a call is required, but no tools are.", "tool_choice")
    return choice


def guide_of(
    content: ContentForm | None, choice: ToolChoice, tools: Sequence[ToolSpec], single_call: bool
) -> Guide | None:
    """What a reply must be; None when it is free.

    Calls keep to their tools' schemas if one of these is strict, if only some tools are allowed,
    or if anything else has a form.
    """
    allowed = tuple(tool for tool in tools if choice.names is None or tool.name in choice.names)
    if choice.mode == "required":
        return Guide(calls="required", tools=allowed, single_call=single_call)
    bound = choice.names is not None or any(tool.strict for tool in allowed) or content is not None
    if choice.mode == "auto" and allowed and bound:
        return Guide(content=content, calls="watched", tools=allowed, single_call=single_call)
    return None if content is None else Guide(content=content)


class _Name(Struct, frozen=True):
    name: str | None = None


class _Entry(Struct):
    type: str = "function"
    name: str | None = None
    function: _Name = _Name()

    def called(self) -> str:
        name = self.function.name or self.name
        if not name:
            raise InvalidRequest("tool_choice: it names no function.", "tool_choice")
        return name


class _Allowed(Struct):
    mode: Literal["auto", "required"] = "auto"
    tools: list[_Entry] = []


class _Choice(_Entry, kw_only=True):
    allowed_tools: _Allowed | None = None
    mode: Literal["auto", "required"] = "auto"
    tools: list[_Entry] = []


def _choice_of(value: object) -> ToolChoice:
    if value is None:
        return ToolChoice()
    if isinstance(value, str):
        return _choice_by_word(value)
    try:
        choice = msgspec.convert(value, _Choice)
    except msgspec.ValidationError as error:
        raise invalid(error, "tool_choice") from error
    if choice.type == "allowed_tools":
        allowed = choice.allowed_tools or _Allowed(choice.mode, choice.tools)
        return ToolChoice(allowed.mode, tuple(entry.called() for entry in allowed.tools))
    if choice.type != "function":
        raise InvalidRequest(
            f"tool_choice: a call of type {choice.type!r} cannot be had here.", "tool_choice"
        )
    return ToolChoice("required", (choice.called(),))


def _choice_by_word(word: str) -> ToolChoice:
    match word:
        case "auto" | "none" | "required":
            return ToolChoice(word)
        case "any":
            return ToolChoice("required")
    raise InvalidRequest(
        f"tool_choice: {word!r} is not one of auto, none, required.", "tool_choice"
    )


def _response_form(given: ResponseFormat | None) -> ContentForm | None:
    if given is None or given.type == "text":
        return None
    if given.type == "json_schema" and given.json_schema is not None:
        return json_schema_form(given.json_schema.schema, "response_format.json_schema.schema")
    if given.schema is not None:
        return json_schema_form(given.schema, "response_format.schema")
    if given.type == "json_schema":
        raise InvalidRequest(
            "response_format.json_schema: is missing.", "response_format.json_schema"
        )
    return json_object("response_format")


def _form(
    kind: Literal["json", "regex", "choice", "grammar"], source: object, param: str
) -> ContentForm | None:
    if not source:
        return None
    if kind == "json":
        return json_schema_form(_parsed(source, param), param)
    if len(str(source)) > MAX_FORM_CHARACTERS:
        raise InvalidRequest(f"{param}: is longer than {MAX_FORM_CHARACTERS} characters.", param)
    return ContentForm(kind, source, param)


def _parsed(source: object, param: str) -> object:
    """vLLM's clients may send a schema as a string of JSON."""
    if not isinstance(source, str):
        return source
    try:
        return msgspec.json.decode(source)
    except msgspec.DecodeError as error:
        raise InvalidRequest(f"{param}: is not valid JSON: {error}.", param) from error
