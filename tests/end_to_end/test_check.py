"""`qwend check`: whether a model fits, before it is loaded; and the cap of the other commands."""

import re
from pathlib import Path

import pytest
from daemon_process import qwend

from benchmarks.make_model import make_model
from benchmarks.model_sizes import SIZES

pytest.importorskip("cuda.core")


def test_it_fits() -> None:
    done = qwend("check", "--gpu-memory", "8G", "--ctx", "4096", "-ctk", "q8_0", "-ctv", "q4_0")
    assert done.returncode == 0, done.stderr
    for word in ("Q4_K", "weights", "states", "workspace", "q8_0/q4_0", "It fits", "would fit"):
        assert word in done.stdout


def test_the_27b_file_fits_24_gib_with_131072_tokens(tmp_path: Path) -> None:
    model = tmp_path / "27b.gguf"
    make_model(model, SIZES["27b"], "q4_k_m", has_data=False)
    flags = ("--gpu-memory", "24G", "--ctx", "131072", "-ctk", "q8_0", "-ctv", "q8_0")
    done = qwend("check", "--model", model, *flags)
    assert done.returncode == 0, done.stderr
    assert re.search(r"It fits, with 1\.[2-9]\d GiB to spare", done.stdout)


def test_it_does_not_fit_and_it_says_what_would() -> None:
    done = qwend("check", "--gpu-memory", "1G", "--parallel", "2")
    assert done.returncode == 1
    assert "It does NOT fit" in done.stdout
    [line] = done.stderr.splitlines()
    assert line.startswith(
        "qwend: error: a context of 32768 tokens does not fit a card of 1.00 GiB"
    )
    assert "tokens would fit" in line


def test_without_a_card_or_a_cap_it_says_what_would_be_needed() -> None:
    if Path("/dev/nvidiactl").exists():
        pytest.skip("there is a card")
    done = qwend("check")
    assert done.returncode == 2
    assert "needs" in done.stdout
    assert "--gpu-memory" in done.stdout


@pytest.mark.parametrize("command", [("serve",), ("generate", "hello"), ("check",)])
def test_a_cap_that_is_no_size(command: tuple[str, ...]) -> None:
    done = qwend(*command, "--gpu-memory", "lots")
    assert done.returncode == 1
    assert "'lots' is no size" in done.stderr


def test_the_cpu_has_no_cap() -> None:
    done = qwend("generate", "hello", "--device", "cpu", "--gpu-memory", "8G", "--no-cache")
    assert done.returncode == 1
    assert "--gpu-memory is the GPU's" in done.stderr
