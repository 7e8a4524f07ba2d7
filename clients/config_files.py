"""Settings merged into another program's JSON, TOML or YAML file, which is its owner's.

Owns reading, merging and writing. What is there stays, comments and order too, as far as it is not
replaced; a file that cannot be read back in full is refused. Every change leaves a copy of what was
before. Runs on the caller's thread.
"""

import io
import json
import os
import tempfile
from collections.abc import Callable, Mapping, MutableMapping
from datetime import datetime
from pathlib import Path
from typing import Any

import tomlkit
from msgspec import Struct
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from tomlkit.exceptions import TOMLKitError

from .agent_settings import Default, Entry
from .client import ClientError


class ConfigFileError(ClientError):
    """A file that cannot be merged into without losing what it holds."""


class Format(Struct, frozen=True):
    """How a kind of file becomes a mapping that remembers its form, and text again."""

    read: Callable[[str], Any]
    write: Callable[[Any], str]


def rendered(path: Path, settings: Mapping[str, Any]) -> str:
    """The settings alone, as a file of that kind would have them."""
    form = _format(path)
    content = form.read("")
    merge(content, settings)
    return form.write(content)


def merged(path: Path, settings: Mapping[str, Any]) -> str:
    """The file's text with the settings in it; writes nothing.

    Raises:
        ConfigFileError: the file cannot be read, or is no mapping.
    """
    form = _format(path)
    try:
        content = form.read(path.read_text() if path.exists() else "")
    except (OSError, ValueError, TOMLKitError, YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigFileError(f"{path} cannot be read, so it is left as it is: {reason}") from error
    if not isinstance(content, MutableMapping):
        raise ConfigFileError(f"{path} is no mapping, so it is left as it is.")
    merge(content, settings)
    return form.write(content)


def replace(path: Path, text: str) -> Path | None:
    """Write `text`, whole or not at all; the copy of what was there before, if anything was.

    A link stays a link; a new file is its owner's alone, since it may hold a key.

    Raises:
        ConfigFileError: the folder or the file cannot be written.
    """
    target = path.resolve()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        backup = _keep(target) if target.exists() else None
        mode = target.stat().st_mode & 0o777 if target.exists() else 0o600
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.chmod(name, mode)
        os.replace(name, target)
    except OSError as error:
        raise ConfigFileError(f"{path} cannot be written: {error.strerror}.") from error
    return backup


def merge(content: MutableMapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Put settings into a mapping, in place; mappings inside are merged in turn."""
    for key, value in settings.items():
        there = content.get(key)
        if isinstance(value, Default):
            content.setdefault(key, value.value)
        elif isinstance(value, Entry):
            content[key] = _with_entry(there, value)
        elif isinstance(value, Mapping) and isinstance(there, MutableMapping):
            merge(there, value)
        else:
            content[key] = _plain(value)


def _with_entry(there: Any, entry: Entry) -> Any:
    elements = there if isinstance(there, list) else []
    wanted = entry.content[entry.key]
    for element in elements:
        if isinstance(element, MutableMapping) and element.get(entry.key) == wanted:
            merge(element, entry.content)
            return elements
    elements.append(_plain(entry.content))
    return elements


def _plain(value: Any) -> Any:
    """Without our own marks: an Entry in a new place is a list of one."""
    if isinstance(value, Default):
        return value.value
    if isinstance(value, Entry):
        return [_plain(value.content)]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _keep(path: Path) -> Path:
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    copy = path.with_name(f"{path.name}.{stamp}.bak")
    copy.write_bytes(path.read_bytes())
    copy.chmod(path.stat().st_mode & 0o777)
    return copy


# ── formats ───────────────────────────────────────────────────────────────────────────────────


def _read_json(text: str) -> Any:
    """Strict JSON; comments, which some programs allow, would be lost."""
    try:
        return json.loads(text) if text.strip() else {}
    except json.JSONDecodeError as error:
        hint = " (comments would be lost: add the settings by hand)" if "//" in text else ""
        raise ValueError(f"{error}{hint}") from error


def _write_json(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _yaml() -> YAML:
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 4096
    yaml.indent(mapping=2, sequence=4, offset=2)
    return yaml


def _read_yaml(text: str) -> Any:
    content = _yaml().load(text)
    return _yaml().load("{}\n") if content is None else content


def _write_yaml(content: Any) -> str:
    if hasattr(content, "fa"):
        content.fa.set_block_style()
    stream = io.StringIO()
    _yaml().dump(content, stream)
    return stream.getvalue()


def _write_toml(content: Any) -> str:
    return tomlkit.dumps(content)


def _format(path: Path) -> Format:
    return {
        ".toml": Format(tomlkit.parse, _write_toml),
        ".yml": Format(_read_yaml, _write_yaml),
        ".yaml": Format(_read_yaml, _write_yaml),
    }.get(path.suffix, Format(_read_json, _write_json))
