"""CUDA C++ files to cubins by NVRTC, through a cache of compiled programs.

Owns how a source file is put together and which options it gets; refuses to know what a kernel
computes. Needs no GPU. Our sources include only each other, so no toolkit has to be installed.
Compiles on threads of its own; one thread asks.
"""

import io
import logging
import os
import re
import threading
import weakref
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import NamedTuple

from cuda.core import Program, ProgramOptions

from daemon.errors import KernelCompileError
from daemon.kernels.runtime.cubin_cache import CubinCache, cache_key

KERNELS = Path(__file__).resolve().parent.parent
INCLUDE = KERNELS / "include"
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_120")
"""What every kernel must compile for."""

MAX_THREADS = min(8, os.cpu_count() or 1)

Defines = Mapping[str, str | int]

logger = logging.getLogger(__name__)

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


class Cubin:
    """Machine code of one program, which may still be in the making."""

    def __init__(self, making: Future[bytes]) -> None:
        self._making = making

    @property
    def is_made(self) -> bool:
        """Whether `code` would not wait."""
        return self._making.done()

    def code(self) -> bytes:
        """Waits until it is compiled.

        Raises:
            KernelCompileError: with the compiler's first error; the log has them all.
        """
        return self._making.result()


class _Turns:
    """How many programs may be compiled at a time, until the process ends."""

    def __init__(self, count: int) -> None:
        self._count = self._free = count
        self._is_closed = False
        self._changed = threading.Condition()

    def take(self) -> bool:
        """Wait for a turn; False when there will be none any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._free > 0 or self._is_closed)
            if self._is_closed:
                return False
            self._free -= 1
            return True

    def give_back(self) -> None:
        """End a turn."""
        with self._changed:
            self._free += 1
            self._changed.notify_all()

    def close(self) -> None:
        """Give no more turns, and wait for those that were given."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._free == self._count)


class Compiler:
    """Compiles for one architecture, several programs at a time.

    Args:
        arch: such as "sm_90a".
        cache_folder: where cubins are kept by source, options, architecture and compiler version;
            None compiles anew each time.
    """

    def __init__(self, arch: str, cache_folder: Path | None) -> None:
        self.arch = arch
        self._cache = None if cache_folder is None else _open_cache(cache_folder)
        self._turns = _Turns(MAX_THREADS)
        # The compiler's own library must not be torn down below a thread that is in it.
        weakref.finalize(self, self._turns.close)
        self._cubins: dict[tuple[Path, tuple[tuple[str, str], ...]], Cubin] = {}

    def cubin(self, source: Path, defines: Defines | None = None) -> Cubin:
        """Machine code of a `.cu` file, once for each set of macros; compiled in the background.

        Args:
            source: the file; its `#include "x.cuh"` are taken from its folder or `include/`.
            defines: preprocessor macros, which choose a kernel's constants.
        """
        macros = tuple((name, str(value)) for name, value in sorted((defines or {}).items()))
        if (source, macros) not in self._cubins:
            making: Future[bytes] = Future()
            self._cubins[source, macros] = Cubin(making)
            # Daemons, so that whoever gives up need not wait until everything is compiled.
            arguments = (making, source, macros)
            threading.Thread(target=self._make_in_turn, args=arguments, daemon=True).start()
        return self._cubins[source, macros]

    def finish(self) -> None:
        """Wait for all that was asked for.

        Raises:
            KernelCompileError: the first that did not compile.
        """
        pending = sum(not cubin.is_made for cubin in self._cubins.values())
        if pending:
            logger.info("compiling %d kernels, which are kept for the next start", pending)
        for cubin in self._cubins.values():
            cubin.code()

    def report(self, source: Path, defines: Defines | None = None) -> CompileReport:
        """Compile without the cache and read the assembler's report."""
        log = io.StringIO()
        macros = tuple((name, str(value)) for name, value in sorted((defines or {}).items()))
        options = self._options(source, macros, verbose=True)
        self._compile(source, expand_includes(source), options, log)
        return read_report(log.getvalue())

    def _make_in_turn(
        self, making: Future[bytes], source: Path, macros: tuple[tuple[str, str], ...]
    ) -> None:
        if not self._turns.take():
            making.cancel()
            return
        try:
            making.set_result(self._make(source, macros))
        except BaseException as error:
            making.set_exception(error)
        finally:
            self._turns.give_back()

    def _make(self, source: Path, macros: tuple[tuple[str, str], ...]) -> bytes:
        text, options = expand_includes(source), self._options(source, macros)
        if self._cache is None:
            return self._compile(source, text, options)
        key = cache_key(text, options)
        code = self._cache.find(key)
        if code is None:
            code = self._compile(source, text, options)
            self._cache.keep(key, code)
        return code

    def _compile(
        self, source: Path, text: str, options: ProgramOptions, log: io.StringIO | None = None
    ) -> bytes:
        try:
            return bytes(Program(text, "c++", options).compile("cubin", logs=log).code)
        except Exception as error:
            logger.error("the compiler says of %s:\n%s", source.name, error)
            message = f"{source.name} does not compile for {self.arch}: {first_error(str(error))}"
            raise KernelCompileError(message) from error

    def _options(
        self, source: Path, macros: tuple[tuple[str, str], ...], verbose: bool = False
    ) -> ProgramOptions:
        return ProgramOptions(
            name=source.name,
            arch=self.arch,
            std="c++17",
            define_macro=list(macros) or None,
            ptxas_options=["-v"] if verbose else None,
        )


def _open_cache(folder: Path) -> CubinCache | None:
    try:
        return CubinCache(folder)
    except OSError as error:
        logger.warning("compiled kernels are not kept: %s", error)
        return None


def first_error(log: str) -> str:
    """The line of a compiler's log that says what is wrong."""
    lines = [line.strip(" \0") for line in log.splitlines() if line.strip(" \0")]
    return next(
        (line for line in lines if "error:" in line), lines[0] if lines else "no reason given"
    )


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
