"""Scripts for qwend and for llama-server: what their flags come to, and what is refused."""

import argparse
from pathlib import Path

import pytest

from daemon.commands import serve
from daemon.commands.flags import config_of
from daemon.commands.llama_flags import REFUSED, WITHOUT_EFFECT, Flag
from daemon.config import Config
from daemon.errors import ConfigError
from docs.flags import TABLE, table


def parse(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="qwend")
    serve.register(parser.add_subparsers(dest="command"))
    return parser.parse_args(["serve", *flags])


def config(*flags: str) -> Config:
    return config_of(parse(*flags))


def test_the_table_is_what_the_source_says() -> None:
    assert TABLE.read_text() == table(), "run: python -m docs.flags"


def test_a_script_for_llama_server() -> None:
    line = (
        "-m model.gguf -c 65536 -ngl 99 -ctk q8_0 -ctv f16 -np 2 -b 2048 -ub 512 -fa on "
        "--host localhost --port 9000 --api-key one,two --alias coder --jinja --no-mmap --mlock "
        "-t 8 --chat-template-file t.jinja --slot-save-path /tmp/slots --temp 0.7 --top-p 0.8 "
        "--top-k 20 --min-p 0 --repeat-penalty 1.05 -s 42 -n -1 --reasoning-budget 500 "
        "--reasoning-format deepseek --no-webui --cache-reuse 256 --no-context-shift"
    )
    got = config(*line.split())
    assert got.model.path == Path("model.gguf")
    assert (got.model.alias, got.model.chat_template_file) == ("coder", Path("t.jinja"))
    engine = got.engine
    assert (engine.context, engine.parallel, engine.device) == (65536, 2, "auto")
    assert (engine.key_format, engine.value_format) == ("q8_0", "bf16")
    assert (got.server.host, got.server.port) == ("localhost", 9000)
    assert got.server.api_keys == ("one", "two")
    reply = got.reply
    assert (reply.temperature, reply.top_p, reply.top_k, reply.min_p) == (0.7, 0.8, 20, 0)
    assert (reply.repetition_penalty, reply.seed, reply.max_tokens) == (1.05, 42, None)
    assert reply.thinking_budget == 500
    notes = " ".join(parse(*line.split()).notes)
    silent = ("-ngl", "-b ", "-ub", "-fa", "--jinja", "--no-mmap", "--mlock", "-t ", "--no-webui")
    assert all(name in notes for name in silent)


@pytest.mark.parametrize("flag", WITHOUT_EFFECT, ids=lambda flag: flag.names[0])
def test_a_flag_without_effect_says_so(flag: Flag) -> None:
    for name in flag.names:
        values = ["1"] * flag.values if isinstance(flag.values, int) else []
        arguments = parse(name, *values)
        assert arguments.notes == (f"{name} has no effect: {flag.why}",)
        assert config_of(arguments) == config()


@pytest.mark.parametrize("flag", REFUSED, ids=lambda flag: flag.names[0])
def test_a_flag_that_is_refused_is_named(flag: Flag, capsys: pytest.CaptureFixture[str]) -> None:
    for name in flag.names:
        with pytest.raises(SystemExit):
            parse(name, *(["1"] * flag.values if isinstance(flag.values, int) else []))
        assert f"{name}: {flag.why}" in capsys.readouterr().err


def test_layers_of_the_gpu() -> None:
    assert config("-ngl", "0").engine.device == "cpu"
    assert config("-ngl", "-1").engine.device == "auto"
    assert config("--n-gpu-layers", "all").engine.device == "auto"
    assert config("--device", "CUDA0").engine.device == "cuda"
    with pytest.raises(SystemExit):
        parse("-ngl", "many")


def test_all_of_the_context() -> None:
    assert config("-c", "0").engine.context == 0
    assert config().engine.context is None


@pytest.mark.parametrize(
    ("given", "bytes_in_memory"),
    [("0", 0), ("512", 512 * 2**20), ("2G", 2 * 2**30), ("-1", 20 * 2**30)],
)
def test_memory_for_checkpoints(given: str, bytes_in_memory: int) -> None:
    assert config("--cache-ram", given).cache.memory_bytes == bytes_in_memory


def test_thinking_by_flags() -> None:
    assert config("--reasoning-effort", "low").reply.reasoning_effort == "low"
    assert config("--reasoning-budget", "0").reply.template_options == {"enable_thinking": False}
    assert config("--reasoning-budget", "-1").reply.thinking_budget is None
    assert config("--reasoning", "on").reply.template_options == {"enable_thinking": True}
    wins = config("--reasoning", "off", "--chat-template-kwargs", '{"enable_thinking": true}')
    assert wins.reply.template_options == {"enable_thinking": True}
    for wrong in ("{", "3"):
        with pytest.raises(ConfigError, match="--chat-template-kwargs"):
            config("--chat-template-kwargs", wrong)


@pytest.mark.parametrize(
    "flags", [("--temp", "3"), ("--top-k", "-1"), ("--min-p", "x"), ("--reasoning-format", "none")]
)
def test_values_out_of_range(flags: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(*flags)
    assert flags[0] in capsys.readouterr().err


# ── access ────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(autouse=True)
def _no_keys_around(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QWEND_API_KEY", raising=False)
    monkeypatch.delenv("LLAMA_API_KEY", raising=False)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
def test_beyond_this_machine_keys_are_needed(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="--without-api-key"):
        config("--host", host)
    assert config("--host", host, "--without-api-key").server.api_keys == ()
    assert config("--host", host, "--api-key", "k").server.api_keys == ("k",)
    monkeypatch.setenv("QWEND_API_KEY", "a, b")
    found = config("--host", host).server
    assert (found.api_keys, found.is_local) == (("a", "b"), False)


def test_pages_that_may_ask() -> None:
    flags = ("--cors-origin", "https://a.example/", "--cors-origins", "https://b.example, *")
    assert config(*flags).server.cors_origins == ("https://a.example", "https://b.example", "*")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.3.2.1", "::1", "localhost"])
def test_loopback_needs_none(host: str) -> None:
    assert config("--host", host).server.is_local


def test_keys_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# mine\nfirst\n\n  second  # of a friend\n")
    assert config("--api-key-file", str(file)).server.api_keys == ("first", "second")
    file.write_text("# none yet\n")
    for path in (file, tmp_path / "absent"):
        with pytest.raises(ConfigError, match="--api-key-file"):
            config("--api-key-file", str(path))


def test_time_outs() -> None:
    patient = config().server
    assert (patient.queue_timeout_s, patient.request_timeout_s) == (600, None)
    hasty = config("--queue-timeout", "0", "--request-timeout", "2.5").server
    assert (hasty.queue_timeout_s, hasty.request_timeout_s) == (None, 2.5)
