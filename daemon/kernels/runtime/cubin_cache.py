"""Compiled kernels on disk, by a hash of everything that went into them.

Owns the form of an entry: the machine code, then its checksum. A damaged entry counts as absent; a
folder that cannot be written only costs the next start its time. Any thread.
"""

import contextlib
import logging
from pathlib import Path

import xxhash
from cuda.core import ProgramOptions
from cuda.core.utils import FileStreamProgramCache, make_program_cache_key

CACHE_BYTES = 256 * 2**20
SUM_BYTES = 16

logger = logging.getLogger(__name__)


class CubinCache:
    """One folder of entries, which several processes may share; the least recently read go first.

    Raises:
        OSError: the folder cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._entries = FileStreamProgramCache(folder, max_size_bytes=CACHE_BYTES)

    def find(self, key: bytes) -> bytes | None:
        """Machine code kept under `key`, or None when there is none or it is damaged."""
        with contextlib.suppress(OSError):
            entry: bytes | None = self._entries.get(key)
            if entry is not None:
                code, checksum = entry[:-SUM_BYTES], entry[-SUM_BYTES:]
                if code and _checksum(code) == checksum:
                    return code
                logger.warning("a compiled kernel in the cache is damaged; compiling it again")
        return None

    def keep(self, key: bytes, code: bytes) -> None:
        """Store machine code; without room or permission nothing is kept, and a warning says so."""
        try:
            self._entries[key] = code + _checksum(code)
        except OSError as error:
            logger.warning("a compiled kernel could not be kept in the cache: %s", error)


def cache_key(source: str, options: ProgramOptions) -> bytes:
    """Hash of source (headers are part of it), options, architecture and compiler version."""
    key: bytes = make_program_cache_key(
        code=source, code_type="c++", options=options, target_type="cubin"
    )
    return key


def _checksum(code: bytes) -> bytes:
    return xxhash.xxh3_128_digest(code)
