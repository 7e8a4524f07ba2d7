"""A process that saves checkpoints until it is killed, and says which ones are on disk.

    python saving_child.py FOLDER FIRST [MAX_FILE_BYTES]

Prints "saved N" once prompt N is flushed; with a limit of the file's size, stops after 40 prompts.
"""

import resource
import sys
from itertools import count
from pathlib import Path

from cache_harness import Simulated, open_cache, prompt

NUM_PAGES = 5
PAGE_BYTES = 40_000
STATE_BYTES = 300_000


def sequence_of(cache, number: int) -> Simulated:  # type: ignore[no-untyped-def]
    tokens = prompt(NUM_PAGES, number)
    return Simulated(cache, tokens, page_bytes=PAGE_BYTES, state_bytes=STATE_BYTES)


def main(folder: Path, first: int, max_file_bytes: int | None) -> None:
    cache = open_cache(folder, budget_bytes=1 << 30)
    numbers = count(first)
    if max_file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, max_file_bytes))
        numbers = iter(range(first, first + 40))
    for number in numbers:
        sequence = sequence_of(cache, number)
        sequence.prefill()
        sequence.save(128, "user")
        sequence.save(64 * NUM_PAGES, "prompt")
        if number % 3 == 0:
            cache.flush()
            print("saved", number, flush=True)
    stats = cache.stats()
    cache.close()
    print("dropped", stats.num_dropped, "written", stats.num_written, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else None)
