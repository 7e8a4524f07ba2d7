"""No parameter is ignored in silence, and the table of them is complete."""

import asyncio
from collections.abc import Callable

import pytest
from http_harness import ApiHarness

from daemon.api.parameters import Parameters, ignored_header
from docs.parameters import DIALECTS, TABLE, table

MakeApi = Callable[..., ApiHarness]
each_dialect = pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.path)


def test_the_table_is_what_the_source_says() -> None:
    assert TABLE.read_text() == table(), "run: python -m docs.parameters"


@each_dialect
def test_every_field_says_what_it_means(dialect: Parameters) -> None:
    assert [name for name, meaning in dialect.honoured() if not meaning] == []


@each_dialect
def test_no_parameter_means_two_things(dialect: Parameters) -> None:
    fields = {name for name, _ in dialect.honoured()}
    assert not fields & dialect.no_ops.keys()
    assert not fields & dialect.refused.keys()
    assert not dialect.no_ops.keys() & dialect.refused.keys()


def test_what_means_nothing_is_named_in_a_header(make_api: MakeApi) -> None:
    api = make_api()
    tools = [{"type": "web_search"}]
    options = {"include_usage": True, "colour": 1}
    response = asyncio.run(api.post(wizardry=1, user="me", stream_options=options, tools=tools))
    assert response.status_code == 200
    named = response.headers["x-qwend-ignored"]
    assert named == "wizardry, stream_options.colour, tools[0] (web_search)"


@pytest.mark.parametrize("name", ["", " ", "a ", " a", "\n", "é", "\x00", "x" * 999, "a," * 600])
def test_any_name_may_be_named(name: str) -> None:
    [value] = ignored_header((name, "b", name)).values()
    assert value == value.strip()
    assert value.isprintable()
    assert len(value) <= 1000
