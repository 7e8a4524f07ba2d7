"""Which KV pages of the device are free, and who may take them. Numbers only, no memory.

Owns the free list, and how many hold each page: full pages of a common beginning are shared, and
nobody writes them. Pages are handed out next to the sequence's last one when possible, since a
backend reads adjacent pages without gathering. Engine thread only.
"""

from bisect import bisect_left, insort


class KVPages:
    """The free list of a fixed number of pages."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages))
        self._num_holders = [0] * num_pages

    @property
    def num_free(self) -> int:
        """Pages that can be taken."""
        return len(self._free)

    def take(
        self, count: int, after: tuple[int, ...] = (), spared: int = 0
    ) -> tuple[int, ...] | None:
        """`count` pages to follow a page table, or None and nothing taken when too few are free.

        Args:
            spared: how many must be free after that.
        """
        if count and count + spared > len(self._free):
            return None
        taken: list[int] = []
        last = after[-1] if after else None
        for _ in range(count):
            last = self._take_one(last)
            taken.append(last)
            self._num_holders[last] = 1
        return tuple(taken)

    def share(self, pages: tuple[int, ...]) -> None:
        """Hold pages that others hold; each must be given back once more."""
        for page in pages:
            assert self._num_holders[page], f"page {page} is free"
            self._num_holders[page] += 1

    def give_back(self, pages: tuple[int, ...]) -> None:
        """Hold pages no longer; each must have been taken or shared."""
        for page in pages:
            assert self._num_holders[page], f"page {page} is free"
            self._num_holders[page] -= 1
            if not self._num_holders[page]:
                insort(self._free, page)

    def _take_one(self, last: int | None) -> int:
        if last is not None:
            index = bisect_left(self._free, last + 1)
            if index < len(self._free) and self._free[index] == last + 1:
                return self._free.pop(index)
        return self._free.pop(self._start_of_longest_run())

    def _start_of_longest_run(self) -> int:
        """Index of the first page of the longest run of free pages, so that it can grow."""
        best_start, best_length, start = 0, 0, 0
        for index in range(1, len(self._free) + 1):
            ends = index == len(self._free) or self._free[index] != self._free[index - 1] + 1
            if ends:
                if index - start > best_length:
                    best_start, best_length = start, index - start
                start = index
        # The page before a run belongs to a sequence that may grow into it: leave it half.
        return best_start if self._free[best_start] == 0 else best_start + best_length // 2
