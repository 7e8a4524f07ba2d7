"""`qwend check`: what a model takes of the GPU, as a table; printed before anything is loaded.

Owns the words; the numbers are the plan's. Main thread.
"""

from rich.console import Console
from rich.table import Table

from daemon.checkpoint import PAGE_TOKENS
from daemon.config import EngineConfig
from daemon.engine.memory.memory_plan import (
    CONTEXT_BYTES,
    MARGIN_BYTES,
    PAGES,
    MemoryPlan,
    gibibytes,
)


def print_report(plan: MemoryPlan, config: EngineConfig, console: Console | None = None) -> None:
    """The table of regions, and below it what fits."""
    console = console or Console(highlight=False)
    table = Table("", "", title=f"Memory on {plan.card}", show_header=False, title_justify="left")
    table.add_column("", justify="right", no_wrap=True)
    for each in plan.needs.formats:
        table.add_row(f"  {each.format}", _count(each.num_tensors, "tensor"), _size(each.num_bytes))
    for name, what, num_bytes in _regions(plan, config):
        table.add_row(name, what, _size(num_bytes))
    table.add_section()
    table.add_row("all regions", "", _size(sum(plan.regions.values())))
    table.add_row(
        "margin", "kernels' code, recorded graphs, a prompt's tables", _size(MARGIN_BYTES)
    )
    table.add_row("CUDA", "its own part of a card, assumed", _size(CONTEXT_BYTES))
    console.print(table)
    for line in _verdict(plan):
        console.print(line, soft_wrap=True)


def _regions(plan: MemoryPlan, config: EngineConfig) -> list[tuple[str, str, int]]:
    needs, demand = plan.needs, plan.demand
    states = f"{needs.num_slots} of {needs.state_bytes / 2**20:.1f} MiB"
    per_token = needs.page_bytes / PAGE_TOKENS / 1024
    formats = f"{config.key_format}/{config.value_format}, {per_token:.1f} KiB a token"
    one = demand.least_pages * needs.page_bytes
    rows = [
        ("weights", "on the GPU, tables included", needs.weights_bytes),
        ("states", states, needs.states_bytes),
        ("workspace", "what a step overwrites", needs.workspace_bytes),
        ("KV", f"{demand.context_length:,} tokens of {formats}", one),
    ]
    more = plan.num_pages - demand.least_pages
    if more:
        what = f"{more * PAGE_TOKENS:,} tokens more, for requests side by side"
        rows.append(("", what, plan.regions[PAGES] - one))
    if plan.num_inner_slots:
        what = f"{plan.num_inner_slots} more, for edits inside messages"
        rows.append(("states", what, plan.num_inner_slots * needs.state_bytes))
    return rows


def _verdict(plan: MemoryPlan) -> list[str]:
    needed = plan.required_bytes + MARGIN_BYTES + CONTEXT_BYTES
    context = plan.demand.context_length
    if plan.budget_bytes is None:
        return [
            f"A context of {context:,} tokens needs {gibibytes(needed)} of a card in all. There is "
            "no GPU here to compare with: pass --gpu-memory, for example 24G.",
        ]
    if not plan.fits:
        return [f"It does NOT fit: {gibibytes(-plan.spare_bytes)} are missing."]
    return [
        f"It fits, with {gibibytes(plan.spare_bytes)} to spare beyond one context of {context:,} "
        "tokens.",
        f"The longest context that would fit: {plan.fitting_tokens:,} tokens.",
    ]


def _count(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB" if num_bytes < 2**30 else gibibytes(num_bytes)
