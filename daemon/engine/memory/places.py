"""Pages and slots of the device: free, or taken by what stays there until others need them.

Owns both free lists and what stays. Whoever needs pages gets those of what was used longest ago,
ended sequences or states inside messages. Engine thread only.
"""

from daemon.checkpoint import Reason
from daemon.engine.memory.inner_states import InnerState, InnerStates
from daemon.engine.memory.kv_pages import KVPages
from daemon.engine.memory.residents import Branch, Resident, Residents
from daemon.engine.memory.slots import Slots


class Places:
    """See the module's docstring.

    Args:
        num_inner_slots: of the slots, as many as states inside messages may take.

    Attributes:
        residents: what sequences left that have ended, or that others parted from.
        audited: the same of audits, for audits alone.
        inner: states inside messages.
    """

    def __init__(self, num_pages: int, num_slots: int, num_inner_slots: int) -> None:
        self.pages = KVPages(num_pages)
        self.slots = Slots(num_slots)
        self.residents = Residents()
        self.audited = Residents()
        self.inner = InnerStates()
        self.num_inner_slots = num_inner_slots
        self._lent: set[int] = set()

    def find_pages(
        self, count: int, after: tuple[int, ...] = (), spared: int = 0, spare_newest: bool = False
    ) -> tuple[int, ...] | None:
        """Free pages, in place of what stays if need be; `spare_newest`: but for the newest."""
        while (pages := self.pages.take(count, after, spared)) is None:
            if not self._free_oldest(spare_newest):
                return None
        return pages

    def find_slot(self) -> int | None:
        """A free slot, in place of an ended sequence if need be."""
        while (slot := self.slots.take()) is None:
            if not self._free_resident():
                return None
        return slot

    def find_inner_slot(self, worth: float) -> int | None:
        """A slot for a state inside a message, if it is worth as much as another that has one; see
        `InnerStates`. It is lent until `stay_inside` or `give_back`."""
        if len(self.inner) + len(self._lent) >= self.num_inner_slots:
            lesser = self.inner.take_lesser(worth)
            if lesser is None:
                return None
            self.free(lesser)
        slot = self.slots.take()
        if slot is not None:
            self._lent.add(slot)
        return slot

    def give_back(self, slot: int) -> None:
        """Free a slot that was found."""
        self._lent.discard(slot)
        self.slots.give_back(slot)

    def stay(self, residents: Residents, resident: Resident, limit: int) -> None:
        """Let one stay among at most `limit` of its kind; its slot is its own, its pages shared."""
        self.pages.share(resident.branch.pages)
        residents.add(resident)
        while len(residents) > limit and (oldest := residents.take_oldest()):
            self.free(oldest)

    def stay_inside(
        self, name: bytes, branch: Branch, reason: Reason, before: InnerState | None
    ) -> InnerState:
        """Let a state inside a message stay, in place of one of the same tokens; its slot is its
        own, its pages shared."""
        self._lent.remove(branch.slot)
        self.pages.share(branch.pages)
        if (old := self.inner.take(name)) is not None:
            self.free(old)
        return self.inner.add(name, branch, reason, before)

    def forget(self, branch: Branch) -> None:
        """Let one go, if it is here still, whose state others must not use."""
        if self.residents.take(branch) is not None:
            self.free(branch)

    def forget_all(self) -> None:
        """Let everything go that no sequence holds."""
        for branch in self.inner.take_all():
            self.free(branch)
        for residents in (self.residents, self.audited):
            while (oldest := residents.take_oldest()) is not None:
                self.free(oldest)

    def free(self, branch: Branch) -> None:
        """Give back what a branch holds."""
        self.pages.give_back(branch.pages)
        self.slots.give_back(branch.slot)

    def _free_resident(self) -> bool:
        """The newest goes last, as in `_free_oldest`."""
        branch = self.residents.take_oldest(spare_newest=True) or self.audited.take_oldest()
        return self._free_any(branch or self.residents.take_oldest())

    def _free_oldest(self, spare_newest: bool) -> bool:
        """What the last request used goes last: after what audits have done, which takes longer to
        do again than a checkpoint to be restored."""
        branch = self._take_stale() or self.audited.take_oldest()
        if branch is None and not spare_newest:
            inner = self.inner.oldest()
            branch = self.inner.take(inner.name) if inner else self.residents.take_oldest()
        return self._free_any(branch)

    def _take_stale(self) -> Branch | None:
        """What was used longest ago, but for the newest ended sequence, and for states that the
        last request went by."""
        inner, resident = self.inner.oldest(), self.residents.oldest()
        if inner is not None and inner.last_visit < self.inner.num_visits:
            if resident is None or inner.last_visit <= resident.last_visit:
                return self.inner.take(inner.name)
        return None if resident is None else self.residents.take(resident.branch)

    def _free_any(self, branch: Branch | None) -> bool:
        if branch is not None:
            self.free(branch)
        return branch is not None
