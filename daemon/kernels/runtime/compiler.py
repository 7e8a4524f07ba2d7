"""CUDA C++ files to cubins by NVRTC, through a cache of compiled programs.

Owns how a source file is put together and which options it gets; refuses to know what a kernel
computes. Needs no GPU. Our sources include only each other, so no toolkit has to be installed.
Any thread, one at a time for each Compiler.
"""

import io
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from cuda.core import Program, ProgramOptions
from cuda.core.utils import FileStreamProgramCache

from daemon.errors import KernelCompileError

KERNELS = Path(__file__).resolve().parent.parent
INCLUDE = KERNELS / "include"
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_120")
"""What every kernel must compile for."""

CACHE_BYTES = 256 * 2**20

_INCLUDE_LINE = re.compile(r'^\s*#\s*include\s+"([^"]+)"\s*$')
_ENTRY = re.compile(r"Compiling entry function '(\w+)'")
_SPILL = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_SERIALIZED_WGMMA = re.compile(r"C75\d\d")


class Resources(NamedTuple):
    """What the assembler says of one kernel: registers a thread, and bytes spilled to memory."""

    registers: int
    spill_bytes: int


class CompileReport(NamedTuple):
    """The assembler's report on a program.

    `serialized_wgmma` holds its advisories that matrix instructions were made to wait on each
    other, which costs most of their speed.
    """

    kernels: dict[str, Resources]
    serialized_wgmma: tuple[str, ...]


class Compiler:
    """Compiles for one architecture.

    Args:
        arch: such as "sm_90a".
        cache_folder: where cubins are kept by source, options, architecture and compiler version;
            None compiles anew each time.
    """

    def __init__(self, arch: str, cache_folder: Path | None) -> None:
        self.arch = arch
        self._cache_folder = cache_folder

    def cubin(self, source: Path, defines: Mapping[str, str | int] | None = None) -> bytes:
        """Machine code of a `.cu` file.

        Args:
            source: the file; its `#include "x.cuh"` are taken from its folder or `include/`.
            defines: preprocessor macros, which choose a kernel's constants.

        Raises:
            KernelCompileError: with the compiler's log.
        """
        program = self._program(source, defines or {}, verbose=False)
        try:
            return bytes(program.compile("cubin", cache=self._cache).code)
        except Exception as error:
            raise _compile_error(source, self.arch, error) from error

    def report(self, source: Path, defines: Mapping[str, str | int] | None = None) -> CompileReport:
        """Compile without the cache and read the assembler's report."""
        log = io.StringIO()
        try:
            self._program(source, defines or {}, verbose=True).compile("cubin", logs=log)
        except Exception as error:
            raise _compile_error(source, self.arch, error) from error
        return read_report(log.getvalue())

    @cached_property
    def _cache(self) -> FileStreamProgramCache | None:
        if self._cache_folder is None:
            return None
        self._cache_folder.mkdir(parents=True, exist_ok=True)
        return FileStreamProgramCache(self._cache_folder, max_size_bytes=CACHE_BYTES)

    def _program(self, source: Path, defines: Mapping[str, str | int], verbose: bool) -> Program:
        options = ProgramOptions(
            name=source.name,
            arch=self.arch,
            std="c++17",
            define_macro=[(name, str(value)) for name, value in sorted(defines.items())] or None,
            ptxas_options=["-v"] if verbose else None,
        )
        return Program(expand_includes(source), "c++", options)


def expand_includes(source: Path) -> str:
    """The text of a file with each `#include "..."` replaced by that file's text, once each.

    `#line` marks keep the compiler's messages pointing at the file that people edit.

    Raises:
        KernelCompileError: an included file does not exist.
    """
    return "".join(_expanded(source, {source}))


def _expanded(source: Path, seen: set[Path]) -> list[str]:
    lines = [f'#line 1 "{source.name}"\n']
    for number, line in enumerate(source.read_text().splitlines(), start=1):
        included = _INCLUDE_LINE.match(line)
        if not included:
            lines.append("\n" if line.strip() == "#pragma once" else line + "\n")
            continue
        path = _find(included[1], source)
        if path not in seen:
            seen.add(path)
            lines += _expanded(path, seen)
        lines.append(f'#line {number + 1} "{source.name}"\n')
    return lines


def _find(name: str, source: Path) -> Path:
    for folder in (source.parent, INCLUDE):
        if (folder / name).is_file():
            return (folder / name).resolve()
    raise KernelCompileError(f"{source.name} includes {name}, which is not installed.")


def _compile_error(source: Path, arch: str, error: Exception) -> KernelCompileError:
    return KernelCompileError(f"{source.name} does not compile for {arch}: {error}")


def read_report(log: str) -> CompileReport:
    """Registers, spills and wgmma advisories from the log of `ptxas -v`."""
    kernels: dict[str, Resources] = {}
    entry, spill = "", 0
    for line in log.splitlines():
        if found := _ENTRY.search(line):
            entry, spill = found[1], 0
        elif found := _SPILL.search(line):
            spill = max(int(found[1]), int(found[2]))
        elif (found := _REGISTERS.search(line)) and entry:
            kernels[entry] = Resources(int(found[1]), spill)
    serialized = tuple(line for line in log.splitlines() if _SERIALIZED_WGMMA.search(line))
    return CompileReport(kernels, serialized)
