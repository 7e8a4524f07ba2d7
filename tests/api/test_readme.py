"""The table of parameters is complete."""

import re
from pathlib import Path

import daemon.api
from daemon.api import openai_chat_request as chat

README = Path(daemon.api.__file__).parent / "README.md"


def test_every_parameter_is_in_the_readme() -> None:
    named = set(re.findall(r"`([a-z_]+)`", README.read_text()))
    known = {*chat.ChatRequest.__struct_fields__, *chat.NO_OPS, *chat.REFUSED}
    assert known - named == set()


def test_no_parameter_means_two_things() -> None:
    fields = set(chat.ChatRequest.__struct_fields__)
    assert not fields & chat.NO_OPS
    assert not fields & chat.REFUSED.keys()
    assert not chat.NO_OPS & chat.REFUSED.keys()
