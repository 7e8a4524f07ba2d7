"""Builds every object, top to bottom, and joins them. The only file that imports from all folders.

Runs on the main thread; the model itself is loaded on the engine's thread, which will own it.
"""

import logging
import time
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from starlette.applications import Starlette

from daemon import __version__
from daemon.api.app import create_app
from daemon.api.service import Service
from daemon.audit import AuditedEngine
from daemon.cache.checkpoint_cache import CacheLimits, CheckpointCache
from daemon.cache.prefix_hash import fingerprint
from daemon.checkpoint import Reach
from daemon.config import DEFAULT_CONTEXT, CacheConfig, Config, EngineConfig, ModelConfig
from daemon.devices import make_backend, plan_memory, prefill_tokens
from daemon.engine.backends.backend import Backend
from daemon.engine.checkpointing import CheckpointStore, NoCheckpoints
from daemon.engine.engine import StepEngine
from daemon.engine.engine_thread import EngineThread
from daemon.engine.memory.memory_plan import MemoryDemand, MemoryPlan, Room
from daemon.engine.model.model import Model
from daemon.engine.model.shape import ModelShape
from daemon.engine.requests import EngineInfo
from daemon.engine.scheduler import Limits, Scheduler, num_slots
from daemon.engine.weights.digest import weights_digest
from daemon.engine.weights.gguf import GGUFFile, open_gguf
from daemon.engine.weights.loader import load_model, model_shape
from daemon.errors import ConfigError, ModelFileError
from daemon.load_progress import LoadProgress
from daemon.metrics import Metrics
from daemon.service_settings import configured
from daemon.text.constrainer import Constrainer
from daemon.text.normalisers import Normaliser, read_names
from daemon.text.prompt import PromptBuilder
from daemon.text.prompt_history import FrameShape, PastPrompt, PromptHistory
from daemon.text.replay import SampledTokens
from daemon.text.template import FRAME_END, FRAME_START, ChatTemplate
from daemon.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

STATE_VERSION = 1
"""Counts changes to the layout or the arithmetic of states; a new one makes old ones unusable."""

MAX_STORED_PROMPT_TOKENS = 1 << 20
"""Of prompts of earlier runs, so many tokens are read back at the start."""

NUM_CAPTURE_SLOTS = 4


class Daemon:
    """All that runs, and the order in which it ends.

    Args:
        grace_s: seconds, at the end, in which checkpoints that wait are still written.
    """

    def __init__(
        self, service: Service, engine: EngineThread, cache: CheckpointCache | None, grace_s: float
    ) -> None:
        self.service = service
        self.engine = engine
        self.cache = cache
        self.grace_s = grace_s

    def app(self) -> Starlette:
        """The HTTP application."""
        return create_app(self.service)

    def __enter__(self) -> "Daemon":
        return self

    def __exit__(self, *_: object) -> None:
        """End running requests, keep their work, write what is queued."""
        logger.info("stopping: requests end, their work is kept; idle work is dropped")
        self.engine.stop()
        self.service.constrainer.close()
        if self.cache is not None:
            self.cache.close(self.grace_s)


class NoReplies:
    """Remembers no replies: what `--no-cache` leaves of the memory of sampled tokens."""

    def recall(self, frame_text: str) -> tuple[int, ...] | None:
        """Nothing is remembered."""
        return None

    def remember(self, entries: object) -> None:
        """Dropped."""


def embedded_model() -> Path:
    """The model file that ships inside the package."""
    return Path(str(files("daemon.embedded") / "tiny-coder-Q4_K_M.gguf"))


def open_model_file(config: ModelConfig) -> GGUFFile:
    """The model file that is asked for, or the embedded one.

    Raises:
        ModelFileError, UnsupportedModel: see `open_gguf`.
    """
    return open_gguf(config.path or embedded_model())


def load_for_evaluation(model: ModelConfig, engine: EngineConfig, num_tokens: int) -> Model:
    """The model on its backend, for `engine.evaluation` of one text of `num_tokens`.

    Raises:
        ModelError: see `load_model`.
        DeviceError: see `make_backend`.
    """
    file = open_model_file(model)
    shape = model_shape(file)
    demand = MemoryDemand(context_length=max(num_tokens, 1), num_sequences=1, num_slots=1)
    return _load(file, make_backend(engine, file, shape, demand))


def memory_plan(model: ModelConfig, engine: EngineConfig) -> MemoryPlan:
    """What `assemble` would take on the GPU, found without loading anything.

    Raises:
        ModelError: the file cannot be served.
        DeviceError: see `plan_memory`.
    """
    file = open_model_file(model)
    context = _context_length(model_shape(file), engine)
    return plan_memory(engine, file, _demand(engine, context, has_store=True))


def assemble(config: Config) -> Daemon:
    """Open the model and the store, load the weights, start the engine.

    Raises:
        QwendError: the model, the store or a setting cannot be used.
    """
    file = open_model_file(config.model)
    shape = model_shape(file)
    tokenizer = Tokenizer.from_metadata(file.metadata)
    template_source = _template_source(file, config.model)
    template = ChatTemplate(template_source, tokenizer.control_tokens)
    context = _context_length(shape, config.engine)
    demand = _demand(config.engine, context, config.cache.enabled)
    kept = config.cache.memory_bytes if config.cache.enabled else None
    backend = make_backend(config.engine, file, shape, demand, kept)
    identity = _identity(file, template_source, backend)
    name = _model_name(file, config.model)
    cache = _open_cache(config.cache, identity, name)
    replies = NoReplies() if cache is None else cache.sampled
    info = EngineInfo(
        model_name=name,
        context_length=context,
        vocab_size=min(tokenizer.num_real_tokens, shape.vocab_size),
        num_parameters=sum(tensor.num_elements for tensor in file.tensors.values()),
        backend=backend.name,
        max_sequences=config.engine.parallel,
    )
    engine = EngineThread(
        _engine_builder(file, backend, config.engine, demand, info, cache or NoCheckpoints()),
        info,
        max_requests=config.engine.parallel + config.engine.max_waiting,
    )
    try:
        engine.start()
    except BaseException:
        if cache is not None:
            cache.close()
        raise
    history = _prompt_history(tokenizer, cache, identity)
    audit = _audit(engine, cache, config.cache)
    service = Service(
        engine=audit or engine,
        engine_state=lambda: "ok" if engine.failure is None else "stopped",
        tokenizer=tokenizer,
        prompts=_prompt_builder(tokenizer, template, replies, cache, config.cache),
        constrainer=Constrainer(tokenizer),
        remember=replies.remember,
        cache_stats=lambda: _cache_stats(cache, audit, backend),
        metrics=Metrics(),
        history=history,
        sessions=None if cache is None else cache.catalogue,
        suggest_title=_ignore_title if cache is None else cache.suggest_title,
        reach=_reach(cache, engine, config.engine.strict),
        fingerprint=f"qwend-{__version__}-{identity.hex()[:12]}",
        works_ahead=cache is not None and config.engine.canonical,
        version=__version__,
        created=int(time.time()),
    )
    settled = configured(service, config, file, template_source)
    return Daemon(settled, engine, cache, config.cache.stop_grace_s)


def _prompt_builder(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    replies: SampledTokens,
    cache: CheckpointCache | None,
    config: CacheConfig,
) -> PromptBuilder:
    """With what the store has learned of clients."""
    normaliser = Normaliser(read_names(config.normalise))
    cuts = None if cache is None else cache.cuts
    return PromptBuilder(tokenizer, template, replies, normaliser, cuts)


def _audit(
    engine: EngineThread, cache: CheckpointCache | None, config: CacheConfig
) -> AuditedEngine | None:
    """Checks some of the engine's answers, if that is asked for."""
    if not config.audit_share:
        return None
    if cache is None:
        raise ConfigError("--audit-share checks checkpoints: leave out --no-cache.")
    return AuditedEngine(engine, config.audit_share, cache.discard)


def _cache_stats(
    cache: CheckpointCache | None, audit: AuditedEngine | None, backend: Backend
) -> dict[str, Any]:
    if cache is None:
        return {}
    audited = None if audit is None else audit.counts()
    parts = {"audit": audited, "buffers": backend.host_buffers}
    there = {name: part for name, part in parts.items() if part is not None}
    return {**msgspec.to_builtins(cache.stats()), **msgspec.to_builtins(there)}


def _engine_builder(
    file: GGUFFile,
    backend: Backend,
    config: EngineConfig,
    demand: MemoryDemand,
    info: EngineInfo,
    store: CheckpointStore,
) -> Callable[[Callable[[], None]], StepEngine]:
    """Loads the weights and reserves memory when called, on the thread that calls."""

    def build(wake: Callable[[], None]) -> StepEngine:
        backend.attach()
        model = _load(file, backend)
        limits = _limits(config, demand, model.backend.fit(demand.most_pages))
        backend.allocate(model.shape, limits.num_slots, limits.num_pages)
        return StepEngine(
            model,
            Scheduler(limits, config.strict),
            store,
            context_length=info.context_length,
            num_tokens=info.vocab_size,
            strict=config.strict,
            canonical=config.canonical,
            wake=wake,
        )

    return build


def _limits(config: EngineConfig, demand: MemoryDemand, room: Room) -> Limits:
    return Limits(
        max_sequences=demand.num_sequences,
        max_waiting=config.max_waiting,
        prefill_tokens=prefill_tokens(config),
        num_pages=room.num_pages,
        num_capture_slots=NUM_CAPTURE_SLOTS,
        max_residents=2 * demand.num_sequences,
        num_inner_slots=room.num_inner_slots,
    )


def _demand(config: EngineConfig, context_length: int, has_store: bool) -> MemoryDemand:
    """Pages for all sequences at full length, where they fit."""
    return MemoryDemand(
        context_length=context_length,
        num_sequences=config.parallel,
        num_slots=num_slots(config.parallel, NUM_CAPTURE_SLOTS),
        has_inner_states=has_store,
    )


def _load(file: GGUFFile, backend: Backend) -> Model:
    with LoadProgress(file.paths[0].name, file.num_bytes) as progress:
        return load_model(file, backend, lambda tensor: progress.advance(tensor.num_bytes))


def _open_cache(config: CacheConfig, identity: bytes, model_name: str) -> CheckpointCache | None:
    if not config.enabled:
        return None
    return CheckpointCache.open(
        config.folder,
        CacheLimits(
            budget_bytes=config.budget_bytes,
            memory_bytes=config.memory_bytes,
            interval_tokens=config.interval_tokens,
            write_delay_s=config.write_delay_s,
            daily_bytes=config.daily_bytes,
        ),
        fingerprint=identity,
        model_name=model_name,
    )


def _ignore_title(session: str, title: str, is_final: bool) -> None:
    """Without a store there are no sessions to name."""


def _reach(
    cache: CheckpointCache | None, engine: EngineThread, strict: bool
) -> Callable[[Sequence[int]], Reach]:
    """What store and device have of a prompt; the last token is always evaluated."""
    if cache is None:
        return lambda _: Reach(None)
    return lambda tokens: cache.reach(tokens, len(tokens) - 1, strict, engine.born_on_device)


def _prompt_history(
    tokenizer: Tokenizer, cache: CheckpointCache | None, identity: bytes
) -> PromptHistory:
    """What new prompts are compared with: at the start, what the store has from before."""
    shape = FrameShape(tokenizer.control_tokens[FRAME_START], tuple(tokenizer.encode(FRAME_END)))
    history = PromptHistory(shape)
    stored = [] if cache is None else cache.stored_prompts(MAX_STORED_PROMPT_TOKENS)
    for number, prompt in enumerate(reversed(stored)):
        tokens = np.frombuffer(prompt.tokens, "<u4").astype(np.uint32)
        history.add(
            PastPrompt(
                id=f"stored-{number}",
                session=prompt.session,
                tokens=tokens,
                num_prompt=len(tokens),
                num_evaluated=len(tokens),
                began_s=prompt.used_us / 1e6,
                state="stored",
                model="" if prompt.fingerprint == identity else prompt.fingerprint.hex(),
            )
        )
    return history


def _identity(file: GGUFFile, template_source: str, backend: Backend) -> bytes:
    """What a state depends on: equal identities may use one another's checkpoints."""
    return fingerprint(
        {
            "weights": weights_digest(file),
            "template": template_source.encode(),
            "numerics": backend.numerics.encode(),
            "state": STATE_VERSION.to_bytes(4, "little"),
        }
    )


def _context_length(shape: ModelShape, config: EngineConfig) -> int:
    asked = config.context
    if asked is not None and asked > shape.context_length:
        raise ConfigError(f"--ctx {asked} is more than the model's {shape.context_length} tokens")
    if asked == 0:
        return shape.context_length
    return asked or min(shape.context_length, DEFAULT_CONTEXT)


def _model_name(file: GGUFFile, config: ModelConfig) -> str:
    if config.alias:
        return config.alias
    return file.paths[0].stem if config.path else "tiny-coder"


def _template_source(file: GGUFFile, config: ModelConfig) -> str:
    if config.chat_template_file is not None:
        try:
            return config.chat_template_file.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--chat-template-file: {error}") from error
    source = file.metadata.get("tokenizer.chat_template")
    if not isinstance(source, str):
        raise ModelFileError(
            f"{file.paths[0]}: has no chat template; pass one with --chat-template-file"
        )
    return source
