"""A model's steps run on paper: every kernel that they launch is asked for before the first one."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("cuda.core")

from tensor_tables import tensor_table

from daemon.engine.backends import cuda_plan
from daemon.engine.backends.cuda_memory import CudaLimits
from daemon.engine.backends.cuda_plan import memory_needs
from daemon.engine.batch import Batch, Span
from daemon.engine.model.model import Model
from daemon.kernels.runtime.compiler import KERNELS, Cubin
from daemon.kernels.runtime.paper_device import Card, PaperCompiler

HOPPER = Card("H100", "sm_90a", 132, 227 * 1024)
AMPERE = Card("RTX 3090", "sm_86", 82, 99 * 1024)


class Listing(PaperCompiler):
    """Notes what is asked for."""

    def __init__(self, arch: str) -> None:
        super().__init__(arch)
        self.sources: set[str] = set()
        self.variants: set[tuple[str, str]] = set()

    def cubin(self, source: Path, defines: Mapping[str, str | int] | None = None) -> Cubin:
        self.sources.add(source.name)
        self.variants.add((source.name, repr(sorted((defines or {}).items()))))
        return super().cubin(source, defines)


def listed(size: str, card: Card, max_sequences: int = 4) -> Listing:
    compiler = Listing(card.arch)
    limits = CudaLimits(context_length=4096, max_sequences=max_sequences)
    memory_needs(tensor_table(size), card, limits, 12, compiler)
    return compiler


def test_every_kernel_belongs_to_a_step_of_some_model_on_some_card() -> None:
    sizes = (("9b", HOPPER), ("4b", AMPERE), ("35b-a3b", AMPERE))
    asked = set().union(*(listed(size, card).sources for size, card in sizes))
    assert asked == {path.name for path in KERNELS.glob("*.cu")}


@pytest.mark.parametrize("num_tokens", [1, 65, 700, 1433, 1984])
def test_no_length_of_a_prompt_needs_another_kernel(
    monkeypatch: pytest.MonkeyPatch, num_tokens: int
) -> None:
    rehearsed = listed("27b", HOPPER).variants

    def run_one(model: Model, limits: CudaLimits) -> None:
        span = Span(np.zeros(num_tokens, np.int32), 0, 0, pages=(0,), samples=True)
        model.logits(Batch("prefill", (span,)))

    monkeypatch.setattr(cuda_plan, "_run_steps", run_one)
    assert listed("27b", HOPPER).variants <= rehearsed


def test_variants_are_few_enough_to_wait_for() -> None:
    few, many = listed("27b", HOPPER).variants, listed("27b", HOPPER, max_sequences=16).variants
    assert few < many
    assert len(many) < 50
