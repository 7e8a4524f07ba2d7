"""The engine: plan → forward → sample → emit → checkpoint, one step at a time.

Token ids in, token ids out; knows no text, no HTTP and no disk. Owns the sequences and, through the
scheduler, all places on the device. Runs on one thread, which `engine_thread` provides.
"""

import time
from collections.abc import Callable

from daemon.checkpoint import PAGE_TOKENS, Boundary
from daemon.engine.batch import Span
from daemon.engine.checkpointing import CheckpointStore, NoCheckpoints
from daemon.engine.memory.inner_states import inside
from daemon.engine.model.model import Model
from daemon.engine.outbox import Outbox
from daemon.engine.requests import (
    Deliver,
    Event,
    Failed,
    Finished,
    FinishReason,
    GenerationRequest,
    Progress,
    Started,
    TokenSampled,
)
from daemon.engine.restoring import Restoring
from daemon.engine.saving import Saving
from daemon.engine.scheduler import Scheduler, Work
from daemon.engine.sequence import Phase, Sequence
from daemon.errors import DeviceError, DeviceLost, QwendError

KEEP_EVERY_MS = 20_000.0


class StepEngine:
    """Runs sequences to their end.

    Args:
        model: on its backend, whose memory is already allocated for `scheduler.limits`.
        store: where checkpoints are found and kept.
        context_length: tokens of prompt and reply together.
        num_tokens: ids that may be sampled; the vocabulary without its padding.
        strict: restore only states that were born by prompt evaluation.
        canonical: evaluate replies again while the device is idle, so that what outlives the
            conversation was born by prompt evaluation.
        wake: called, on any thread, when a checkpoint has been read, or is on its way to the
            device, or has been saved.
    """

    def __init__(
        self,
        model: Model,
        scheduler: Scheduler,
        store: CheckpointStore,
        *,
        context_length: int,
        num_tokens: int,
        strict: bool,
        canonical: bool,
        wake: Callable[[], None],
    ) -> None:
        self.model = model
        self.backend = model.backend
        self.scheduler = scheduler
        self.store = store
        self.context_length = context_length
        self.num_tokens = num_tokens
        self.canonical = canonical
        self.sequences: dict[str, Sequence] = {}
        self.saving = Saving(model.backend, wake)
        self.restoring = Restoring(model.backend, scheduler, self.saving, strict, self._start, wake)
        self.outbox = Outbox()
        self.keep_every_ms = KEEP_EVERY_MS
        self._num_wipes = store.num_wipes
        store.expect(*self.backend.snapshot_sizes, self.backend.host_buffer)

    # ── commands ──────────────────────────────────────────────────────────────────────────────

    def add(self, request: GenerationRequest, deliver: Deliver) -> None:
        """Queue a request."""
        assert request.id not in self.sequences, "request ids are unique"
        store = NoCheckpoints() if request.priority == "audit" else self.store
        timeline = store.timeline(request.tokens, request.session)
        sequence = Sequence(request, self.outbox.through(deliver), timeline)
        if sequence.is_idle_work and not request.max_tokens:
            self._end_contained_idle_work(request)
        self.sequences[request.id] = sequence
        self.scheduler.add(sequence)
        surplus = self.scheduler.surplus_idle()
        if surplus is not None:
            self.cancel(surplus.request.id)

    def cancel(self, request_id: str) -> None:
        """End a request now; what was evaluated for it is kept. Unknown ids are ignored."""
        sequence = self.sequences.get(request_id)
        if sequence is not None:
            self._keep_interrupted(sequence)
            self._finish(sequence, "cancelled")
            self.outbox.empty()

    def fail(self, sequences: tuple[Sequence, ...], error: QwendError) -> None:
        """End sequences with an error and free their places."""
        for sequence in sequences:
            self._close(sequence, Failed(error))

    # ── the main loop ─────────────────────────────────────────────────────────────────────────

    def step(self) -> bool:
        """Advance every sequence that can be advanced; False when there was nothing to do.

        What a step gives is delivered while the next one runs, where the backend allows it.
        """
        self.saving.forget_done()
        num_admitted = self._admit()
        num_restored = self.restoring.advance()
        while (victim := self.scheduler.make_room()) is not None:
            self._keep_interrupted(victim)
            self.scheduler.preempt(victim)
        decode = self.scheduler.plan_decode()
        if decode is not None:
            self._run(decode)
        prefill = self.scheduler.plan_prefill()
        if prefill is not None:
            self._run(prefill)
        if not decode and not prefill:
            self.outbox.empty()
        return bool(decode or prefill or num_restored or num_admitted)

    def stop(self) -> None:
        """End all requests and wait until what was done for them has been handed to the store.

        What nobody waits for is dropped.
        """
        for sequence in list(self.sequences.values()):
            if sequence.is_idle_work:
                self._finish(sequence, "cancelled")
            else:
                self.cancel(sequence.request.id)
        self.outbox.empty()
        self.saving.finish()

    def _admit(self) -> int:
        """Give waiting sequences their places, in place of idle work if need be; counts them."""
        num_admitted = 0
        if self.store.num_wipes != self._num_wipes:
            self._num_wipes = self.store.num_wipes
            self.scheduler.places.forget_all()
        while True:
            for sequence in self.scheduler.admit():
                num_admitted += 1
                self.restoring.take_state(sequence)
                self._take_over_idle_work(sequence)
                self.restoring.begin(sequence)
            self._note_followers()
            idle = self.scheduler.in_the_way()
            if idle is None:
                return num_admitted
            self._set_aside(idle)

    def _note_followers(self) -> None:
        now_s = time.perf_counter()
        for sequence in self.scheduler.followers:
            if sequence.follows_since_s is None:
                sequence.follows_since_s = now_s

    def _take_over_idle_work(self, sequence: Sequence) -> None:
        """Idle work that is going the way of a request, and not ahead of it, is done by that."""
        for idle in [s for s in self.scheduler.running if s.is_idle_work and s.is_kept]:
            is_behind = idle.timeline.shared_with(sequence.timeline) > idle.num_evaluated
            if is_behind and not sequence.is_idle_work:
                self._set_aside(idle)

    def _set_aside(self, idle: Sequence) -> None:
        """Idle work gives up its places; what it has done stays."""
        self._keep_interrupted(idle)
        if idle.is_kept:
            self.scheduler.leave_resident(idle)
        self.scheduler.preempt(idle)

    def _run(self, work: Work) -> None:
        began = time.perf_counter()
        if not self.backend.overlaps:
            self.outbox.empty()
        try:
            logits = self.model.logits(work.batch)
            self.outbox.empty()
            self._advance(work)
            pairs = zip(work.sequences, work.batch.spans, strict=True)
            sampling = tuple(sequence for sequence, span in pairs if span.samples)
            rows = [sequence.sampling_row() for sequence in sampling]
            sampled = self.backend.sample(logits, rows, self.num_tokens) if rows else []
            if all(sequence.is_idle_work for sequence in work.sequences):
                # Of idle work one step is under way: a request would wait for all there are.
                self.backend.wait()
        except DeviceLost:
            raise
        except DeviceError as error:
            self._release_captures(work)
            self.fail(work.sequences, error)
            return
        self._checkpoint(work)
        self._account(work, (time.perf_counter() - began) * 1e3)
        for sequence, choice in zip(sampling, sampled, strict=True):
            if (failure := sequence.failure) is not None:
                self.fail((sequence,), failure)
                continue
            if (probed := sequence.probed(choice.logprobs)) is not None:
                sequence.deliver(probed)
            sequence.append(choice.token)
            sequence.phase = Phase.DECODE
            reason = sequence.finish_reason(self.context_length)
            if reason != "stop":
                sequence.deliver(TokenSampled(choice.token, sequence.asked_of(choice.logprobs)))
            if reason is not None:
                self._end_reply(sequence, reason)
        for sequence in work.sequences:
            if not sequence.request.max_tokens and sequence.num_evaluated >= sequence.goal:
                self._finish(sequence, "length")

    def _advance(self, work: Work) -> None:
        """Record what has been evaluated, and mark the grid positions that decoding passed."""
        for sequence, span in zip(work.sequences, work.batch.spans, strict=True):
            sequence.num_evaluated = span.end
            if work.batch.kind == "prefill":
                if sequence.born == "prompt":
                    sequence.num_grid_pages = span.end // PAGE_TOKENS
                continue
            sequence.born = "decode"
            if span.end % PAGE_TOKENS == 0:
                self._hold(sequence, sequence.slot, span.end)
                sequence.mark = span.end

    def _hold(self, sequence: Sequence, slot: int, position: int) -> None:
        """Keep a state on the grid beside the sequence's own."""
        self.backend.copy_slot(slot, sequence.mark_slot)
        sequence.held, sequence.held_born = position, sequence.born

    def _account(self, work: Work, elapsed_ms: float) -> None:
        for sequence in work.sequences:
            if work.batch.kind == "decode":
                sequence.decode_ms += elapsed_ms
                continue
            sequence.prompt_ms += elapsed_ms
            sequence.deliver(Progress(min(sequence.num_evaluated, sequence.num_prompt),
                                      sequence.num_prompt))  # fmt: skip

    # ── checkpoints ───────────────────────────────────────────────────────────────────────────

    def _start(self, sequence: Sequence, position: int) -> None:
        sequence.num_evaluated = sequence.num_restored = position
        sequence.phase = Phase.PREFILL
        sequence.positions = sequence.audit_positions
        if sequence.is_kept:
            boundaries = sequence.request.boundaries
            sequence.plan_checkpoints(sequence.timeline.positions(boundaries, position))
            if self.scheduler.limits.num_inner_slots:
                sequence.inside = inside(boundaries)
        if not sequence.was_started:
            sequence.was_started = True
            sequence.num_cached = position
            restored = sequence.found if position else None
            since_s = sequence.follows_since_s
            followed_ms = None if since_s is None else (time.perf_counter() - since_s) * 1e3
            sequence.deliver(Started(sequence.num_prompt, position, restored, followed_ms))
        if not sequence.request.max_tokens and sequence.goal <= position:
            self._finish(sequence, "length")

    def _checkpoint(self, work: Work) -> None:
        """Save what the batch captured on its way."""
        for sequence, span in zip(work.sequences, work.batch.spans, strict=True):
            planned = [c for c in span.captures if c.position in sequence.positions]
            for capture in planned if sequence.is_kept else ():
                reason = sequence.positions[capture.position]
                self.saving.begin(sequence, capture.position, capture.slot, sequence.born, reason)
            self._keep_on_the_way(sequence, span, is_kept_now=bool(planned))
            if planned and self.scheduler.limits.max_residents:
                last = planned[-1]
                self._hold(sequence, last.slot, last.position)
            left = [c for c in planned if self.scheduler.leave_junction(sequence, c)]
            self.scheduler.give_back(c for c in planned if c not in left)
            self.scheduler.leave_inside(sequence, (c for c in span.captures if c not in planned))

    def _keep_on_the_way(self, sequence: Sequence, span: Span, is_kept_now: bool) -> None:
        """A slow prompt is kept by time too: a kill costs no more than these seconds."""
        if is_kept_now:
            sequence.kept_ms = sequence.prompt_ms
        elif sequence.is_kept and sequence.phase is Phase.PREFILL and span.end % PAGE_TOKENS == 0:
            if sequence.prompt_ms - sequence.kept_ms > self.keep_every_ms:
                sequence.kept_ms = sequence.prompt_ms
                self.saving.begin(sequence, span.end, sequence.slot, sequence.born, "interrupted")

    def _release_captures(self, work: Work) -> None:
        for span in work.batch.spans:
            self.scheduler.give_back(span.captures)

    def _save_reply(self, sequence: Sequence) -> None:
        """Save the last place on the grid that decoding passed."""
        if sequence.mark > 0:
            self.saving.begin(sequence, sequence.mark, sequence.mark_slot, "decode", "reply")

    def _keep_interrupted(self, sequence: Sequence) -> None:
        """A retry sends the same prompt: let it go on from here."""
        done = sequence.num_evaluated
        if not sequence.is_kept:
            return
        is_new = done > sequence.num_restored
        if sequence.phase is Phase.PREFILL and done % PAGE_TOKENS == 0 and is_new:
            self.saving.begin(sequence, done, sequence.slot, sequence.born, "interrupted")
            self._hold(sequence, sequence.slot, done)
        elif sequence.phase is Phase.DECODE:
            self._save_reply(sequence)

    # ── work for later ────────────────────────────────────────────────────────────────────────

    def _queue_canonical(self, sequence: Sequence) -> None:
        """Have a reply, which decoding put into the store, evaluated as a prompt when idle.

        The stored states of its prompt are made canonical on the way, where they are not.
        """
        reply_end = Boundary(sequence.mark, "reply")
        request = GenerationRequest(
            id=f"{sequence.request.id}-canonical",
            tokens=tuple(sequence.tokens[: sequence.mark]),
            boundaries=(*sequence.request.boundaries, reply_end),
            max_tokens=0,
            session=sequence.request.session,
            priority="canonical",
        )
        self.add(request, _ignore)

    def _end_contained_idle_work(self, request: GenerationRequest) -> None:
        """A newer piece of idle work passes through all that an older one would have done."""
        for other in [s for s in self.sequences.values() if s.is_idle_work]:
            tokens = other.request.tokens
            if not other.request.max_tokens and request.tokens[: len(tokens)] == tokens:
                self.cancel(other.request.id)

    # ── the end of a sequence ─────────────────────────────────────────────────────────────────

    def _end_reply(self, sequence: Sequence, reason: FinishReason) -> None:
        self._save_reply(sequence)
        if self.canonical and sequence.mark > 0:
            self._queue_canonical(sequence)
        self._finish(sequence, reason)

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        reply = sequence.reply
        if reason == "stop":
            reply.pop()
        event = Finished(
            reason=reason,
            num_prompt_tokens=sequence.num_prompt,
            num_cached_tokens=sequence.num_cached,
            tokens=tuple(reply),
            prompt_ms=sequence.prompt_ms,
            decode_ms=sequence.decode_ms,
            num_kept_tokens=min(sequence.num_kept, sequence.num_prompt),
        )
        self._close(sequence, event)

    def _close(self, sequence: Sequence, event: Event) -> None:
        if isinstance(event, Finished) and sequence in self.scheduler.running:
            self.scheduler.leave_resident(sequence)
        self.scheduler.remove(sequence)
        del self.sequences[sequence.request.id]
        sequence.deliver(event)


def _ignore(_: Event) -> None:
    """Nobody waits for the events of idle work."""
