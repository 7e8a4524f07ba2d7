"""The sessions of a store that no daemon has open: the same catalogue, without a model.

Owns the opening and closing. Nothing is evicted here: the next daemon does, by its own budget.
One thread.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from daemon.cache.contents import read_contents
from daemon.cache.learned_cuts import LearnedCuts
from daemon.cache.sampled_text import SampledText
from daemon.cache.session_catalogue import SessionCatalogue
from daemon.cache.store import DATA_FILE, LOCK_FILE, Store
from daemon.cache.transfer import Transfer
from daemon.cache.writer_lock import WriterLock
from daemon.errors import StoreInUse, UnknownSession

_ROOM_BYTES = 64 << 20
_QUEUE_BYTES = 256 << 20
_NO_MODEL = bytes(16)


def is_in_use(path: Path) -> bool:
    """Whether a daemon has the store of a folder open.

    Raises:
        ConfigError: the folder cannot be written.
    """
    if not (path / DATA_FILE).exists():
        return False
    try:
        WriterLock(path / LOCK_FILE).release()
    except StoreInUse:
        return True
    return False


@contextmanager
def offline_catalogue(
    path: Path, *, budget_bytes: int, import_bytes: int = 0
) -> Iterator[SessionCatalogue]:
    """Open a store for changes.

    Args:
        budget_bytes: of which half may be pinned.
        import_bytes: of a session file that is to be taken in.

    Raises:
        UnknownSession: there is no store.
        StoreInUse: a daemon has it open.
        StoreError, ConfigError: see `Store.open_for_writing`.
    """
    data = path / DATA_FILE
    if not data.exists():
        raise UnknownSession(f"There are no checkpoints in {path}.")
    map_bytes = data.stat().st_size + 2 * import_bytes + _ROOM_BYTES
    store = Store.open_for_writing(path, map_bytes)
    with store.reading() as reader:
        contents = read_contents(reader)
    transfer = Transfer(store, contents, max_bytes=sys.maxsize, queue_bytes=_QUEUE_BYTES)
    try:
        yield SessionCatalogue(
            transfer,
            SampledText(
                contents.sampled,
                fingerprint=_NO_MODEL,
                max_bytes=sys.maxsize,
                write=transfer.write_sampled,
            ),
            LearnedCuts(contents.cuts, write=transfer.write_meta),
            contents.sessions,
            max_bytes=budget_bytes,
            fingerprints=list(contents.models),
            names=contents.models,
        )
    finally:
        transfer.close()
