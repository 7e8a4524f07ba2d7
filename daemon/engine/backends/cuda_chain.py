"""Products and norms of few rows that follow one another, gathered to be launched together.

Owns what is gathered, and the order of a decode step's chains; knows no model. Engine thread only.
"""

from daemon.kernels.quant_gemv import MAX_STEPS, GemvKernels, Link, Norm, Plan


class DecodeChain:
    """Links wait here until something other than a link needs their results.

    Args:
        eps: of all norms.
    """

    def __init__(self, kernels: GemvKernels, eps: float) -> None:
        self._kernels = kernels
        self._eps = eps
        self._links: list[Link] = []
        self._num_tokens = 0
        self._firsts: list[Plan] = []
        self._next = 0
        self._is_known = False
        self._is_decoding = False

    def begin_step(self, is_decoding: bool) -> None:
        """A step begins. All decode steps have the same chains, learnt as the first one runs."""
        self._is_decoding = is_decoding
        if is_decoding:
            self._is_known = self._is_known or self._next > 0
            self._next = 0

    def add(self, link: Link, num_tokens: int) -> None:
        """Gather a link over `num_tokens` rows; all links of a chain have as many."""
        assert not self._links or num_tokens == self._num_tokens
        self._links.append(link)
        self._num_tokens = num_tokens
        if len(self._links) == MAX_STEPS:
            self.launch()

    def launch(self) -> None:
        """Launch what was gathered, if anything."""
        if not self._links:
            return
        upcoming = self._upcoming() if self._is_decoding else None
        self._kernels.run(self._links, self._num_tokens, upcoming, self._eps)
        self._links = []

    def _upcoming(self) -> Plan | None:
        """What the next chain multiplies by first; the last one's next is the next step's first."""
        self._next += 1
        if not self._is_known:
            self._firsts.append(_first_plan(self._links))
            return None
        return self._firsts[self._next % len(self._firsts)]


def _first_plan(links: list[Link]) -> Plan:
    return next(link.plan for link in links if not isinstance(link, Norm))
