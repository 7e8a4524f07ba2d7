"""One hash over all of a model file: what the weights are, whatever the file is called.

Reads every byte once, which also brings the file into the page cache before it is loaded.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import xxhash

from daemon.engine.weights.gguf import GGUFFile

PIECE_BYTES = 16 * 2**20
NUM_THREADS = 4


def weights_digest(file: GGUFFile) -> bytes:
    """xxh3-128 over names, shapes, formats and data of all tensors: 16 bytes."""
    digest = xxhash.xxh3_128()
    for tensor in file.tensors.values():
        digest.update(f"{tensor.name} {tensor.shape} {tensor.format.name}\n".encode())
    with ThreadPoolExecutor(NUM_THREADS) as threads:
        for piece in threads.map(xxhash.xxh3_128_digest, _pieces(file)):
            digest.update(piece)
    return digest.digest()


def _pieces(file: GGUFFile) -> Iterator[np.ndarray[Any, Any]]:
    for tensor in file.tensors.values():
        for first in range(0, len(tensor.data), PIECE_BYTES):
            yield tensor.data[first : first + PIECE_BYTES]
