"""One writer a store: a lock on a file beside the data, freed by the kernel if its holder dies.

Owns the lock file. Knows nothing of LMDB; used by the thread that opens and closes the store.
"""

import errno
import fcntl
import os
from pathlib import Path

from daemon.errors import ConfigError, StoreInUse

_HELD = (errno.EWOULDBLOCK, errno.EACCES)


class WriterLock:
    """Held from construction to `release`.

    Raises:
        StoreInUse: another process, or another store of this one, holds it.
        ConfigError: the file cannot be made.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(f"Cannot write in {path.parent}: {error.strerror}.") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._file)
            if error.errno not in _HELD:
                raise ConfigError(f"Cannot lock {path}: {error.strerror}.") from error
            raise StoreInUse(
                f"Another qwend uses the checkpoints in {path.parent}. "
                "Stop it, or choose another folder with --cache-dir."
            ) from error

    def release(self) -> None:
        """Let others in."""
        os.close(self._file)
