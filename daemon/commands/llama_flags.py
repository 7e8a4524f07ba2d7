"""llama-server's flags that qwend does not have itself: without effect here, or refused.

Owns both tables, of which docs/flags.md is made, so that a script for llama-server runs with the
other program, or says at once what it asks for in vain. Flags with an effect are among qwend's own,
under both names. Main thread.
"""

import argparse
from collections.abc import Sequence
from typing import Any, NamedTuple


class Flag(NamedTuple):
    """`values` is how many follow the name: 0, 1, or "?" where the value may be left out."""

    names: tuple[str, ...]
    values: int | str
    why: str


GRID = "prompts are evaluated on a fixed grid of 64 tokens, so that resumed equals cold"
ON_GPU = "all weights are on the GPU, or with --device cpu none"
ONE_GPU = "one GPU computes"
MAPPED = "weights are read from the mapped file once, at the start"
ALWAYS = "it is always so"
LOG = "the log goes to standard error, one line an event"
NO_UI = "there is no page to configure"
CPU = "the GPU computes, or the CPU reference with all cores"

WITHOUT_EFFECT = (
    Flag(("-b", "--batch-size"), 1, GRID),
    Flag(("-ub", "--ubatch-size"), 1, GRID),
    Flag(("-fa", "--flash-attn"), "?", "attention is always of that kind"),
    Flag(("--jinja",), 0, ALWAYS),
    Flag(("-t", "--threads"), 1, CPU),
    Flag(("-tb", "--threads-batch"), 1, CPU),
    Flag(("--threads-http",), 1, "one event loop serves all connections"),
    Flag(("--mmap",), 0, MAPPED),
    Flag(("--no-mmap",), 0, MAPPED),
    Flag(("--mlock",), 0, MAPPED),
    Flag(("--direct-io", "-dio"), 0, MAPPED),
    Flag(("--numa",), 1, CPU),
    Flag(("--prio",), 1, CPU),
    Flag(("--prio-batch",), 1, CPU),
    Flag(("--poll",), 1, CPU),
    Flag(("-C", "--cpu-mask"), 1, CPU),
    Flag(("-Cr", "--cpu-range"), 1, CPU),
    Flag(("--cpu-strict",), 1, CPU),
    Flag(("-mg", "--main-gpu"), 1, ONE_GPU + ": the first that CUDA_VISIBLE_DEVICES shows"),
    Flag(("-fit", "--fit"), 1, "qwend check says what fits"),
    Flag(("-fitt", "--fit-target"), 1, "--gpu-memory caps what is taken"),
    Flag(("-cb", "--cont-batching"), 0, ALWAYS),
    Flag(("--kv-unified", "-kvu"), 0, "all sequences share the pages of keys and values"),
    Flag(("--kv-offload", "-kvo"), 0, ALWAYS),
    Flag(("--swa-full",), 0, "the model has no sliding window"),
    Flag(("--cache-prompt",), 0, ALWAYS),
    Flag(("--cache-reuse",), 1, "prefixes are found by their hash, wherever they came from"),
    Flag(("--ctx-checkpoints", "-ctxcp", "--swa-checkpoints"), 1, "checkpoints have a budget"),
    Flag(("--cache-idle-slots",), 0, ALWAYS),
    Flag(("--no-cache-idle-slots",), 0, "checkpoints have a budget"),
    Flag(("--slot-save-path",), 1, "every session is kept in --cache-dir, and resumes from there"),
    Flag(("-sps", "--slot-prompt-similarity"), 1, "prefixes are found by their hash"),
    Flag(("--metrics",), 0, "/metrics is always there"),
    Flag(("--slots",), 0, "/slots is always there, and shows no text"),
    Flag(("--no-slots",), 0, "/slots shows no text"),
    Flag(("--no-context-shift",), 0, ALWAYS),
    Flag(("--no-warmup",), 0, "kernels are compiled and cached at the start"),
    Flag(("--warmup",), 0, ALWAYS),
    Flag(("--no-webui", "--no-ui"), 0, "there is none"),
    Flag(("--webui", "--ui"), 0, "there is none; qwend chat is for the terminal"),
    Flag(("--no-perf",), 0, "timings are always there"),
    Flag(("--perf",), 0, ALWAYS),
    Flag(("--prefill-assistant",), 0, "a reply always begins a new message"),
    Flag(("--no-prefill-assistant",), 0, ALWAYS),
    Flag(("-to", "--timeout"), 1, "--request-timeout bounds a request, not its silences"),
    Flag(("--offline",), 0, "nothing is ever downloaded"),
    Flag(("-v", "--verbose", "--log-verbose"), 0, LOG),
    Flag(("-lv", "--verbosity", "--log-verbosity"), 1, LOG),
    Flag(("--log-disable",), 0, LOG),
    Flag(("--log-colors",), "?", LOG),
    Flag(("--log-prefix",), 0, LOG),
    Flag(("--log-timestamps",), 0, LOG),
    Flag(("--no-log-prefix", "--no-log-timestamps", "--no-log-jsonl"), 0, LOG),
    Flag(("-Cb", "--cpu-mask-batch", "-Crb", "--cpu-range-batch"), 1, CPU),
    Flag(("--cpu-strict-batch", "--poll-batch"), 1, CPU),
    Flag(("--repack", "-nr", "--no-repack", "--no-host"), 0, ON_GPU),
    Flag(("--op-offload", "--no-op-offload"), 0, ON_GPU),
    Flag(("-lm", "--load-mode", "-lzm", "--lazy-mode"), 1, MAPPED),
    Flag(("-fitc", "--fit-ctx"), 1, "qwend check says what fits"),
    Flag(("-no-kvu", "--no-kv-unified"), 0, "all sequences share the pages of keys and values"),
    Flag(("-nocb", "--no-cont-batching"), 0, "requests are always evaluated together"),
    Flag(("-dt", "--defrag-thold"), 1, "pages do not fragment"),
    Flag(("-cms", "--checkpoint-min-step"), 1, "see --checkpoint-interval"),
    Flag(("-e", "--escape", "--no-escape"), 0, "no prompt comes from the command line"),
    Flag(("--repeat-last-n",), 1, "a repetition penalty counts all of prompt and reply"),
    Flag(("-bs", "--backend-sampling"), 0, "tokens are sampled where the logits are"),
    Flag(("--mmproj-auto", "--no-mmproj", "--no-mmproj-auto"), 0, "the model reads text only"),
    Flag(("--mmproj-offload", "--no-mmproj-offload"), 0, "the model reads text only"),
    Flag(("--sse-ping-interval",), 1, "signs of life come every 5 s, as data that clients count"),
    Flag(("--cors-methods", "--cors-headers"), 1, "a page that is let in may use all"),
    Flag(("--no-cors-credentials",), 0, ALWAYS),
    Flag(("-no-ag", "--no-agent"), 0, "no tools are run here"),
    Flag(("--ui-config", "--webui-config", "--ui-config-file", "--webui-config-file"), 1, NO_UI),
    Flag(("--no-ui-mcp-proxy", "--no-webui-mcp-proxy"), 0, NO_UI),
    Flag(("--tags",), 1, "nothing routes by them"),
    Flag(("--reasoning-preserve",), 0, "the chat template decides which thinking it shows"),
    Flag(("--no-skip-chat-parsing",), 0, ALWAYS),
    Flag(("--check-tensors",), 0, "every tensor's form is checked at the start"),
)

NO_DRAFT = "speculative decoding is not there"
NO_FILES = "one GGUF file on this machine is served; pass it with --model"
NO_ADAPTER = "adapters are not supported"
NO_ROPE = "the context is that of the model file"
NO_SAMPLER = "there is no such stage of sampling"
NO_TOOLS = "this server runs no tools; the agents that ask it do"
PRESETS = (
    *("--gpt-oss-20b-default", "--gpt-oss-120b-default", "--embd-gemma-default"),
    *("--fim-qwen-1.5b-default", "--fim-qwen-3b-default", "--fim-qwen-7b-default"),
    *("--fim-qwen-7b-spec", "--fim-qwen-14b-spec", "--fim-qwen-30b-default"),
    *("--vision-gemma-4b-default", "--vision-gemma-12b-default"),
)
TEXT_ONLY = "the model reads and writes text only"

REFUSED = (
    Flag(("-hf", "-hfr", "--hf-repo"), 1, NO_FILES),
    Flag(("-hff", "--hf-file"), 1, NO_FILES),
    Flag(("-mu", "--model-url"), 1, NO_FILES),
    Flag(("-dr", "--docker-repo"), 1, NO_FILES),
    Flag(("--models-dir",), 1, NO_FILES),
    Flag(("--models-preset",), 1, NO_FILES),
    Flag(("-md", "--model-draft"), 1, NO_DRAFT),
    Flag(("--draft", "--draft-n", "--draft-max"), 1, NO_DRAFT),
    Flag(("--draft-min", "--draft-n-min"), 1, NO_DRAFT),
    Flag(("--spec-type",), 1, NO_DRAFT),
    Flag(("-mm", "--mmproj"), 1, TEXT_ONLY),
    Flag(("-mmu", "--mmproj-url"), 1, TEXT_ONLY),
    Flag(("--lora",), 1, NO_ADAPTER),
    Flag(("--lora-scaled",), 1, NO_ADAPTER),
    Flag(("--control-vector",), 1, NO_ADAPTER),
    Flag(("--embedding", "--embeddings"), 0, "this server makes no embeddings"),
    Flag(("--rerank", "--reranking"), 0, "this server ranks nothing"),
    Flag(("--pooling",), 1, "this server makes no embeddings"),
    Flag(("--context-shift",), 0, "a recurrent state cannot be shifted"),
    Flag(("--keep",), 1, "a recurrent state cannot be shifted"),
    Flag(("-sm", "--split-mode"), 1, ONE_GPU),
    Flag(("-ts", "--tensor-split"), 1, ONE_GPU),
    Flag(("-ot", "--override-tensor"), 1, ON_GPU),
    Flag(("-cmoe", "--cpu-moe"), 0, ON_GPU),
    Flag(("-ncmoe", "--n-cpu-moe"), 1, ON_GPU),
    Flag(("-nkvo", "--no-kv-offload"), 0, ON_GPU),
    Flag(("--rpc",), 1, ONE_GPU),
    Flag(("--rope-scaling",), 1, NO_ROPE),
    Flag(("--rope-scale",), 1, NO_ROPE),
    Flag(("--rope-freq-base",), 1, NO_ROPE),
    Flag(("--rope-freq-scale",), 1, NO_ROPE),
    Flag(("--yarn-orig-ctx",), 1, NO_ROPE),
    Flag(("--override-kv",), 1, "the model is what its file says"),
    Flag(("--no-jinja",), 0, "the model's own template is always used"),
    Flag(("--chat-template",), 1, "pass the template itself with --chat-template-file"),
    Flag(("--grammar",), 1, "send it with a request"),
    Flag(("--grammar-file",), 1, "send it with a request"),
    Flag(("-j", "--json-schema"), 1, "send it with a request"),
    Flag(("--no-cache-prompt",), 0, "pass --no-cache"),
    Flag(("--ignore-eos",), 0, "a reply would never end"),
    Flag(("--samplers",), 1, "the order of the stages is fixed"),
    Flag(("--typical", "--typical-p"), 1, NO_SAMPLER),
    Flag(("--mirostat",), 1, NO_SAMPLER),
    Flag(("--dynatemp-range",), 1, NO_SAMPLER),
    Flag(("--xtc-probability",), 1, NO_SAMPLER),
    Flag(("--dry-multiplier",), 1, NO_SAMPLER),
    Flag(("--logit-bias", "-l"), 1, "send it with a request"),
    Flag(("--props",), 0, "settings do not change while the server runs"),
    Flag(("--ssl-key-file",), 1, "put a proxy before it that speaks TLS"),
    Flag(("--ssl-cert-file",), 1, "put a proxy before it that speaks TLS"),
    Flag(("--api-prefix",), 1, "put a proxy before it"),
    Flag(("--path",), 1, "no files are served"),
    Flag(("--log-file",), 1, LOG),
    Flag(("--log-jsonl",), 0, LOG),
    Flag(("--log-prompts-dir",), 1, "--log-prompts writes them into the log"),
    Flag(("--spec-default", "-cmoed", "--cpu-moe-draft"), 0, NO_DRAFT),
    Flag(
        ("--spec-draft-model", "--spec-draft-hf", "-hfd", "-hfrd", "--hf-repo-draft"), 1, NO_DRAFT
    ),
    Flag(("--spec-draft-ngl", "-ngld", "--gpu-layers-draft", "--n-gpu-layers-draft"), 1, NO_DRAFT),
    Flag(("--spec-draft-n-max", "--spec-draft-n-min"), 1, NO_DRAFT),
    Flag(("--spec-draft-p-min", "--draft-p-min", "--draft-p-split"), 1, NO_DRAFT),
    Flag(("-ctkd", "--cache-type-k-draft", "-ctvd", "--cache-type-v-draft"), 1, NO_DRAFT),
    Flag(("-td", "--threads-draft", "-tbd", "--threads-batch-draft"), 1, NO_DRAFT),
    Flag(("-devd", "--device-draft", "-otd", "--override-tensor-draft"), 1, NO_DRAFT),
    Flag(("-ncmoed", "--n-cpu-moe-draft"), 1, NO_DRAFT),
    Flag(("-lcs", "--lookup-cache-static", "-lcd", "--lookup-cache-dynamic"), 1, NO_DRAFT),
    Flag(("-cl", "--cache-list"), 0, NO_FILES),
    Flag(("--models-max",), 1, NO_FILES),
    Flag(("--models-autoload", "--no-models-autoload"), 0, NO_FILES),
    Flag(PRESETS, 0, NO_FILES),
    Flag(("--list-devices",), 0, "nvidia-smi lists them"),
    Flag(("--image-max-tokens", "--image-min-tokens", "--media-path"), 1, TEXT_ONLY),
    Flag(("--control-vector-scaled",), 1, NO_ADAPTER),
    Flag(("--control-vector-layer-range",), 2, NO_ADAPTER),
    Flag(("--lora-init-without-apply",), 0, NO_ADAPTER),
    Flag(("--embd-normalize",), 1, "this server makes no embeddings"),
    Flag(("-ncffn", "--n-cpu-ffn"), 1, ON_GPU),
    Flag(("--kv-unified-per-slot",), 1, "every request may use all of the context"),
    Flag(("--yarn-ext-factor", "--yarn-attn-factor"), 1, NO_ROPE),
    Flag(("--yarn-beta-slow", "--yarn-beta-fast"), 1, NO_ROPE),
    Flag(("-jf", "--json-schema-file"), 1, "send it with a request"),
    Flag(("-r", "--reverse-prompt"), 1, "send stop with a request"),
    Flag(("-sp", "--special", "--spm-infill"), 0, "text is as the model was trained"),
    Flag(("--sampler-seq", "--sampling-seq"), 1, "the order of the stages is fixed"),
    Flag(("--top-nsigma", "--top-n-sigma", "--xtc-threshold", "--dynatemp-exp"), 1, NO_SAMPLER),
    Flag(("--dry-base", "--dry-allowed-length", "--dry-penalty-last-n"), 1, NO_SAMPLER),
    Flag(("--dry-sequence-breaker", "--adaptive-target", "--adaptive-decay"), 1, NO_SAMPLER),
    Flag(("--mirostat-lr", "--mirostat-ent"), 1, NO_SAMPLER),
    Flag(("--reasoning-budget-message",), 1, "its end is in words that Qwen gives for it"),
    Flag(("--no-reasoning-preserve",), 0, "the chat template decides which thinking it shows"),
    Flag(("--skip-chat-parsing",), 0, "calls and reasoning are always read"),
    Flag(("--sleep-idle-seconds",), 1, "the model stays loaded"),
    Flag(("--cors-credentials",), 0, "a page sends its key itself"),
    Flag(("--reuse-port",), 0, "one server listens on a port"),
    Flag(("-ag", "--agent", "--ui-mcp-proxy", "--webui-mcp-proxy"), 0, NO_TOOLS),
    Flag(("--tools", "--tools-runtime", "--mcp-servers-config", "--mcp-servers-json"), 1, NO_TOOLS),
)


def add_llama_flags(parser: argparse.ArgumentParser) -> None:
    """Know all of them, without a word in the help; `notes` collects what has no effect."""
    parser.set_defaults(notes=())
    for flags, action in ((WITHOUT_EFFECT, _Note), (REFUSED, _Refuse)):
        for flag in flags:
            parser.add_argument(
                *flag.names, nargs=flag.values, action=action, const=flag.why,
                dest=argparse.SUPPRESS, help=argparse.SUPPRESS,
            )  # fmt: skip
    parser.add_argument(
        "--gpu-layers", "-ngl", "--n-gpu-layers", action=_GpuLayers, help=argparse.SUPPRESS
    )
    parser.add_argument(
        "--reasoning-format", action=_ReasoningFormat, dest=argparse.SUPPRESS,
        choices=("deepseek", "auto", "none", "deepseek-legacy"), help=argparse.SUPPRESS,
    )  # fmt: skip


class _Note(argparse.Action):
    """Takes the flag, and notes why it changes nothing."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        namespace.notes = (*namespace.notes, f"{option_string} has no effect: {self.const}")


class _Refuse(argparse.Action):
    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        parser.error(f"{option_string}: {self.const}")


class _GpuLayers(argparse.Action):
    """0 is the CPU; any other number is all layers on the GPU, and said so if it is small."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        layers = str(values)
        if layers == "0":
            namespace.device = "cpu"
            return
        if not (layers.removeprefix("-").isdigit() or layers in ("all", "auto")):
            parser.error(f"argument {option_string}: {layers!r} is no number of layers")
        namespace.notes = (*namespace.notes, f"{option_string} has no effect: {ON_GPU}")


class _ReasoningFormat(argparse.Action):
    """Reasoning has a field of its own, always."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        if values not in ("deepseek", "auto"):
            parser.error(f"{option_string} {values}: reasoning has a field of its own, always")
