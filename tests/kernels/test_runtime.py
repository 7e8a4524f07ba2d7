"""The runtime: sources put together, compiled, cached, loaded and launched."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("cuda.core")

from daemon.errors import KernelCompileError, NoDevice
from daemon.kernels.runtime.compiler import ARCHITECTURES, Compiler, expand_includes, read_report
from daemon.kernels.runtime.device import Device, architecture
from daemon.kernels.runtime.device_array import DeviceArray, ElementType
from daemon.kernels.runtime.graph import Graph
from daemon.kernels.runtime.kernel import Module

ADD = """
#include "warp.cuh"
extern "C" __global__ void add(const float* a, const float* b, float* sum, int n, float scale) {
    wait_for_previous_kernel();
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) sum[i] = a[i] + scale * b[i] + BIAS;
}
"""
PARAMETERS = ["pointer", "pointer", "pointer", "int32", "float32"]


@pytest.fixture
def add_source(tmp_path: Path) -> Path:
    source = tmp_path / "add.cu"
    source.write_text(ADD)
    return source


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_compiles_for_every_architecture(arch: str, add_source: Path) -> None:
    report = Compiler(arch, None).report(add_source, {"BIAS": 0})
    assert 0 < report.kernels["add"].registers <= 32
    assert report.kernels["add"].spill_bytes == 0
    assert not report.serialized_wgmma


def test_a_second_compile_comes_from_the_cache(add_source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    first = Compiler("sm_80", folder).cubin(add_source, {"BIAS": 0}).code()
    kept = sorted(p.name for p in folder.rglob("*") if p.is_file())
    assert Compiler("sm_80", folder).cubin(add_source, {"BIAS": 0}).code() == first
    assert sorted(p.name for p in folder.rglob("*") if p.is_file()) == kept
    assert Compiler("sm_80", folder).cubin(add_source, {"BIAS": 1}).code() != first
    assert Compiler("sm_86", folder).cubin(add_source, {"BIAS": 0}).code() != first


def test_a_changed_include_is_a_changed_source(add_source: Path) -> None:
    header = add_source.parent / "own.cuh"
    header.write_text("#pragma once\n#define OWN 1\n")
    add_source.write_text('#include "own.cuh"\n#include "own.cuh"\nint x = OWN;\n')
    before = expand_includes(add_source)
    assert before.count("#define OWN") == 1
    assert "#pragma once" not in before
    header.write_text("#pragma once\n#define OWN 2\n")
    assert expand_includes(add_source) != before


def test_an_error_is_one_line_with_file_and_line(
    add_source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    add_source.write_text('#include "warp.cuh"\n\nthis is wrong;\nint x = y;\n')
    with pytest.raises(KernelCompileError, match=r"for sm_80: add\.cu\(3\): error: ") as caught:
        Compiler("sm_80", None).cubin(add_source).code()
    assert "\n" not in str(caught.value)
    assert "add.cu(4)" in caplog.text


def test_a_missing_include_is_named(add_source: Path) -> None:
    add_source.write_text('#include "gone.cuh"\n')
    with pytest.raises(KernelCompileError, match=r"gone\.cuh"):
        Compiler("sm_80", None).cubin(add_source).code()


def test_the_report_reads_spills_and_serialized_wgmma() -> None:
    log = (
        "ptxas info    : Compiling entry function 'f' for 'sm_90a'\n"
        "    8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads\n"
        "ptxas info    : Used 168 registers, used 1 barriers\n"
        "ptxas info    : (C7514) Potential Performance Loss: wgmma.mma_async instructions are "
        "serialized due to insufficient register resources\n"
    )
    report = read_report(log)
    assert report.kernels["f"] == (168, 16)
    assert len(report.serialized_wgmma) == 1


def test_architectures() -> None:
    assert architecture((9, 0), "H100") == "sm_90a"
    assert architecture((8, 6), "RTX 3090") == "sm_86"
    assert architecture((12, 0), "RTX 5090") == "sm_120"
    with pytest.raises(NoDevice, match="RTX 2080"):
        architecture((7, 5), "RTX 2080")


def test_views_share_memory_and_stay_inside() -> None:
    array = DeviceArray(4096, (8, 16), ElementType.F32, None)
    assert array.rows(2, 4).pointer == 4096 + 2 * 64
    assert array.rows(2, 4).shape == (2, 16)
    assert array.view((64,), ElementType.BF16, offset_bytes=128).num_bytes == 128
    with pytest.raises(AssertionError):
        array.view((129,))
    with pytest.raises(AssertionError):
        array.view((1,), offset_bytes=2)


@pytest.mark.gpu
def test_launch_copy_and_graph(device: Device, compiler: Compiler, add_source: Path) -> None:
    kernel = Module(compiler.cubin(add_source, {"BIAS": 3})).kernel("add", PARAMETERS)
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 1000)).astype(np.float32)
    on_device = device.to_device(a), device.to_device(b), device.allocate((1000,), np.float32)
    out = on_device[2]

    def launch(dependent: bool) -> None:
        kernel.launch(
            device.stream, (4, 1, 1), (256, 1, 1), *on_device, 1000, 2.0, dependent=dependent
        )

    launch(dependent=False)
    np.testing.assert_allclose(device.to_host(out), a + 2 * b + 3, rtol=1e-6)
    graph = Graph(device, lambda: launch(dependent=True))
    device.fill(out, 0xFF)
    graph.replay()
    np.testing.assert_allclose(device.to_host(out), a + 2 * b + 3, rtol=1e-6)
    assert kernel.blocks_per_sm(256) >= 4


@pytest.mark.gpu
def test_memory_is_given_back(device: Device) -> None:
    before = device.free_bytes()
    array = device.allocate((256, 2**20), np.uint8)
    assert device.free_bytes() <= before - 200 * 2**20
    del array
    assert device.free_bytes() == before


@pytest.mark.gpu
def test_pinned_memory_and_device_copies(device: Device) -> None:
    pinned = device.allocate_pinned(4096)
    pinned[:] = np.arange(4096, dtype=np.uint32).astype(np.uint8)
    source = device.allocate((4096,), np.uint8)
    target = device.allocate((4096,), np.uint8)
    device.write(source, pinned)
    device.copy(target, source)
    np.testing.assert_array_equal(device.to_host(target), pinned)


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: entry.write_bytes(b""),
        lambda entry: entry.write_bytes(entry.read_bytes()[:100]),
        lambda entry: entry.write_bytes(entry.read_bytes().replace(b"ELF", b"elf", 1)),
    ],
)
def test_a_damaged_cache_entry_is_compiled_again(
    add_source: Path, tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    folder = tmp_path / "cache"
    code = Compiler("sm_80", folder).cubin(add_source, {"BIAS": 0}).code()
    [entry] = [path for path in (folder / "entries").rglob("*") if path.is_file()]
    sound = entry.read_bytes()
    damage(entry)
    assert Compiler("sm_80", folder).cubin(add_source, {"BIAS": 0}).code() == code
    assert entry.read_bytes() == sound


def test_a_cache_that_cannot_be_written_costs_time_and_nothing_else(
    add_source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    compiler = Compiler("sm_80", tmp_path / "file" / "cache")
    assert compiler.cubin(add_source, {"BIAS": 0}).code()
    assert "compiled kernels are not kept" in caplog.text


def test_each_program_is_compiled_once_and_errors_come_out_at_the_end(add_source: Path) -> None:
    compiler = Compiler("sm_80", None)
    assert compiler.cubin(add_source, {"BIAS": 0}) is compiler.cubin(add_source, {"BIAS": "0"})
    compiler.finish()
    compiler.cubin(add_source, {"BIAS": "nonsense"})
    with pytest.raises(KernelCompileError, match="nonsense"):
        compiler.finish()


def test_a_process_that_ends_does_not_wait_for_what_is_not_begun(add_source: Path) -> None:
    script = (
        "import pathlib, sys\n"
        "from daemon.kernels.runtime.compiler import Compiler\n"
        "compiler = Compiler('sm_80', None)\n"
        "for bias in range(500):\n"
        "    compiler.cubin(pathlib.Path(sys.argv[1]), {'BIAS': bias})\n"
        "print('ended')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, add_source],
        capture_output=True, text=True, timeout=60, check=False, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "ended\n", "")
