"""What wins: a flag over the model's file, the file over the family's values."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from daemon.api.service import Service
from daemon.config import CacheConfig, Config, EngineConfig, ModelConfig, ReplyConfig, ServerConfig
from daemon.engine.weights.gguf import GGUFFile
from daemon.service_settings import configured

NOTHING = cast(Any, None)


def settings(
    metadata: dict[str, Any] | None = None,
    reply: ReplyConfig | None = None,
    server: ServerConfig | None = None,
) -> Service:
    fields = ("engine", "engine_state", "tokenizer", "prompts", "constrainer", "remember")
    fields += ("cache_stats", "metrics", "history")
    bare = Service(**dict.fromkeys(fields, NOTHING))
    file = cast(GGUFFile, SimpleNamespace(metadata=metadata or {}, paths=(Path("/m/model.gguf"),)))
    config = Config(
        model=ModelConfig(),
        engine=EngineConfig(),
        cache=CacheConfig(folder=Path()),
        server=server or ServerConfig(),
        reply=reply or ReplyConfig(),
    )
    return configured(bare, config, file, "{{ template }}")


def test_a_flag_wins_over_the_file() -> None:
    family = settings().sampling
    assert (family.temperature, family.top_k, family.top_p) == (0.6, 20, 0.95)
    metadata = {"general.sampling.temp": 1.0, "general.sampling.top_k": 40}
    file = settings(metadata).sampling
    assert (file.temperature, file.top_k, file.top_p) == (1.0, 40, 0.95)
    flags = ReplyConfig(temperature=0.0, min_p=0.1, seed=3)
    flag = settings(metadata, flags).sampling
    assert (flag.temperature, flag.top_k, flag.min_p, flag.seed) == (0.0, 40, 0.1, 3)


def test_thinking() -> None:
    assert settings(reply=ReplyConfig(reasoning_effort="low")).defaults.thinking_budget == 1024
    both = ReplyConfig(reasoning_effort="low", thinking_budget=7, max_tokens=9)
    assert settings(reply=both).defaults.thinking_budget == 7
    assert settings(reply=both).defaults.max_tokens == 9
    none = ReplyConfig(reasoning_effort="none", template_options={"a": 1})
    assert settings(reply=none).defaults.template_options == {"enable_thinking": False, "a": 1}


def test_names_are_looked_at_on_loopback_without_keys() -> None:
    local = settings(server=ServerConfig(host="127.0.0.2", allowed_hosts=("box.lan",))).access
    assert local.hosts is not None
    assert {"localhost", "127.0.0.2", "box.lan"} <= local.hosts
    assert settings(server=ServerConfig(api_keys=("k",))).access.hosts is None
    assert settings(server=ServerConfig(is_local=False)).access.hosts is None


def test_facts_of_the_file() -> None:
    facts = settings().facts
    assert (facts.path, facts.chat_template) == ("/m/model.gguf", "{{ template }}")
