"""What the flags and the model's file tell the HTTP side: sampling, defaults, access.

Owns their order: a flag wins over the file, and the file over the family's values. Part of
assembly; pure.
"""

import msgspec

from daemon.api.access import AccessRules, local_hosts
from daemon.api.reasoning_fields import wish_of
from daemon.api.service import Limits, ModelFacts, ReplyDefaults, Service
from daemon.config import Config, ReplyConfig, ServerConfig
from daemon.engine.requests import SamplingParams
from daemon.engine.weights.gguf import GGUFFile

RECOMMENDED = SamplingParams(temperature=0.6, top_p=0.95, top_k=20)
"""Qwen's values for coding, for a file that carries none of its own."""

SAMPLING_FIELDS = tuple(
    name for name in ReplyConfig.__struct_fields__ if name in SamplingParams.__struct_fields__
)


def configured(service: Service, config: Config, file: GGUFFile, template_source: str) -> Service:
    """`service` as configuration and file say."""
    reply = config.reply
    given = {name: getattr(reply, name) for name in SAMPLING_FIELDS}
    changes = {name: value for name, value in given.items() if value is not None}
    wish = wish_of(reply.reasoning_effort, reply.thinking_budget, None)
    return msgspec.structs.replace(
        service,
        sampling=msgspec.structs.replace(_recommended(file), **changes),
        defaults=ReplyDefaults(
            template_options=wish.template_options | reply.template_options,
            thinking_budget=wish.max_tokens,
            max_tokens=reply.max_tokens,
        ),
        access=_access(config.server),
        limits=Limits(
            queue_timeout_s=config.server.queue_timeout_s,
            request_timeout_s=config.server.request_timeout_s,
        ),
        facts=ModelFacts(str(file.paths[0]), template_source),
        log_prompts=config.server.log_prompts,
    )


def _access(server: ServerConfig) -> AccessRules:
    """A key protects from pages that pose as the server; without one, its names do."""
    named = server.is_local and not server.api_keys
    return AccessRules(
        keys=server.api_keys,
        hosts=local_hosts(server.host, server.allowed_hosts) if named else None,
        origins=server.cors_origins,
        requests_per_minute=server.requests_per_minute,
        parallel_requests=server.parallel_requests,
    )


def _recommended(file: GGUFFile) -> SamplingParams:
    """The file's `general.sampling.*` values, the family's where it has none."""
    get = file.metadata.get
    return SamplingParams(
        temperature=float(get("general.sampling.temp", RECOMMENDED.temperature)),
        top_p=float(get("general.sampling.top_p", RECOMMENDED.top_p)),
        top_k=int(get("general.sampling.top_k", RECOMMENDED.top_k)),
    )
