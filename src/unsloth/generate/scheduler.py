"""What is computed next. Decides only; no tensors.

A sequence waits, then its known tokens are computed (in pieces, if they are many), then one token a step. Known tokens
of all that fit come first where nobody reads along: a step of decoding takes nearly as long for a part of the batch as
for all of it. As sequences end, those that wait are let in several at a time, since their known tokens too cost less
together. Where somebody reads, every step decodes, and who waits comes in at once.

Sequences that start with the same tokens form a group: the first is computed, the others take its pages over as they
are, and a copy of the last one if that is not full. When no page is left, the sequence that started last gives its
pages up and waits again, with the tokens it has. Whoever gives up or ends frees its pages at once: work on the device
is in order, so whatever is still being computed with them comes before anything the next owner does.
"""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict
from dataclasses import dataclass, field

from unsloth.generate.pages import PagePool
from unsloth.generate.sequence import Sequence


@dataclass(eq=False)
class Fork:
    """A sequence that goes on from another's pages.

    Attributes:
        sequence: Which.
        source: The page that is copied, or None.
        target: Where to.
    """

    sequence: Sequence
    source: int | None = None
    target: int | None = None


@dataclass(eq=False)
class Chunk:
    """Known tokens ``start`` to ``stop`` of a sequence; after the last of them a token is sampled, for forks too."""

    sequence: Sequence
    start: int
    stop: int
    last: bool
    forks: list[Fork] = field(default_factory=list)


@dataclass(eq=False)
class Plan:
    """One step.

    Attributes:
        chunks: Known tokens to compute.
        decodes: Sequences that get one more token.
        moves: Rows of the batch that go elsewhere first, (from, to).
    """

    chunks: list[Chunk] = field(default_factory=list)
    decodes: list[Sequence] = field(default_factory=list)
    moves: list[tuple[int, int]] = field(default_factory=list)

    @property
    def empty(self) -> bool:
        """Whether there is nothing to do."""
        return not self.chunks and not self.decodes


@dataclass(eq=False)
class _Group:
    start: bytes
    members: list[Sequence]


class Scheduler:
    """Queue, batch and pages.

    Args:
        pool: The pages.
        rows: Sequences that the batch holds.
        budget: Known tokens that a step computes at most.
        max_len: Longest sequence.
    """

    def __init__(self, pool: PagePool, rows: int, budget: int, max_len: int) -> None:
        self.pool, self.budget, self.max_len = pool, budget, max_len
        self.preemptions = 0
        self._together = max(1, rows // 16)
        self._rows = list(range(rows))
        self._waiting: OrderedDict[bytes, _Group] = OrderedDict()
        self._prefill: list[tuple[_Group, Sequence]] = []
        self._running: list[Sequence] = []

    @property
    def waiting(self) -> int:
        """Sequences that wait."""
        return sum(len(group.members) for group in self._waiting.values())

    @property
    def running(self) -> int:
        """Sequences that have a row."""
        return len(self._running) + len(self._prefill)

    def add(self, sequence: Sequence, first: bool = False) -> None:
        """Let a sequence wait, behind all others or before them."""
        start = sequence.start()
        sequence.state = "waiting"
        for group, _ in self._prefill:
            if group.start == start:
                group.members.append(sequence)
                return
        if start in self._waiting:
            self._waiting[start].members.append(sequence)
        else:
            self._waiting[start] = _Group(start, [sequence])
        if first:
            self._waiting.move_to_end(start, last=False)

    def remove(self, sequence: Sequence) -> None:
        """End a sequence, wherever it is."""
        for start, group in list(self._waiting.items()):
            if sequence in group.members:
                group.members.remove(sequence)
                if not group.members:
                    del self._waiting[start]
        for entry in list(self._prefill):
            group, lead = entry
            if lead is sequence:
                self._prefill.remove(entry)
                self._requeue(group)
            elif sequence in group.members:
                group.members.remove(sequence)
        if sequence in self._running:
            self._running.remove(sequence)
        self._give_up(sequence)
        sequence.state = "finished"

    def schedule(self, may_preempt: bool = True) -> Plan | None:
        """The next step; None if a sequence must give its pages up first, and may not yet."""
        plan = Plan()
        budget, read = self._share_of_budget(), self._someone_reads()
        if not read and self._enough_rows():
            self._admit(plan, self._continue(plan, budget))
            if plan.chunks:
                return plan
        for sequence in list(self._running):
            if sequence.state != "running" or not self._has_more(sequence):
                continue
            if not self._make_room(sequence, may_preempt):
                if sequence.state == "running":
                    return None
                continue
            plan.decodes.append(sequence)
        plan.decodes = [sequence for sequence in plan.decodes if sequence.state == "running"]
        self._compact(plan)
        if read:
            self._admit(plan, self._continue(plan, budget))
        for sequence in plan.decodes:
            sequence.computed = sequence.length
            sequence.length += 1
        return plan

    def preempt_all(self) -> None:
        """Let everything that runs wait again; nothing of it may be on the device still."""
        while self._running or self._prefill:
            self._preempt_last()

    def _someone_reads(self) -> bool:
        """Whether tokens of what runs, or of what comes next, are read one by one."""
        coming = [group.members[0] for group in itertools.islice(self._waiting.values(), 1)]
        return any(sequence.request.pieces for sequence in (*self._running, *coming))

    def _enough_rows(self) -> bool:
        """Whether it is time to let those that wait in: there are rows for several, or for all."""
        return bool(self._prefill) or not self._running or len(self._rows) >= min(self.waiting, self._together)

    def _share_of_budget(self) -> int:
        """Known tokens of this step: all that can be computed soon in as few steps as they need, each as large."""
        soon = itertools.islice(self._waiting.values(), len(self._rows))
        leads = [*(lead for _, lead in self._prefill), *(group.members[0] for group in soon)]
        left = sum(len(lead.tokens) - lead.computed for lead in leads)
        return -(-left // max(1, -(-left // self.budget)))

    def _has_more(self, sequence: Sequence) -> bool:
        return sequence.generated < sequence.request.max_tokens and sequence.length < self.max_len

    def _make_room(self, sequence: Sequence, may_preempt: bool) -> bool:
        """A page for the token that is computed next."""
        if sequence.length <= len(sequence.pages) * self.pool.size:
            return True
        while not self.pool.free:
            if not may_preempt:
                return False
            self._preempt_last()
            if sequence.state != "running":
                return False
        sequence.pages += self.pool.take(1)
        return True

    def _preempt_last(self) -> None:
        self.preemptions += 1
        if self._prefill:
            group, lead = self._prefill.pop()
            self._give_up(lead)
            group.members.insert(0, lead)
            lead.state = "waiting"
            self._requeue(group)
            return
        sequence = self._running.pop()
        self._give_up(sequence)
        self.add(sequence, first=True)

    def _requeue(self, group: _Group) -> None:
        """Put what is left of a group before all others."""
        if not group.members:
            return
        if group.start in self._waiting:
            self._waiting[group.start].members[:0] = group.members
        else:
            self._waiting[group.start] = group
        self._waiting.move_to_end(group.start, last=False)

    def _give_up(self, sequence: Sequence) -> None:
        self.pool.release(sequence.pages)
        sequence.pages, sequence.computed, sequence.known = [], 0, 0
        if sequence.row is not None:
            heapq.heappush(self._rows, sequence.row)
            sequence.row = None

    def _compact(self, plan: Plan) -> None:
        """Move the highest rows into lower free ones once less than half of the rows up to the highest are in use."""
        held = [s for s in (*self._running, *(lead for _, lead in self._prefill)) if s.row is not None]
        if not held or 2 * len(held) > max(s.row for s in held if s.row is not None):
            return
        for sequence in sorted(held, key=lambda s: -(s.row or 0)):
            assert sequence.row is not None
            if not self._rows or self._rows[0] > sequence.row:
                break
            target = heapq.heappop(self._rows)
            heapq.heappush(self._rows, sequence.row)
            plan.moves.append((sequence.row, target))
            sequence.row = target

    def _continue(self, plan: Plan, budget: int) -> int:
        """The next pieces of what was begun; returns what is left of the budget."""
        for entry in list(self._prefill):
            if not budget:
                break
            group, lead = entry
            budget -= self._chunk(plan, group, lead, budget)
            if lead.state == "running":
                self._prefill.remove(entry)
        return budget

    def _admit(self, plan: Plan, budget: int) -> None:
        while self._waiting and self._rows and budget:
            start, group = next(iter(self._waiting.items()))
            lead = group.members[0]
            shared = self.pool.find(lead.root, lead.tokens[:-1])
            needed = -(-len(lead.tokens) // self.pool.size) - len(shared)
            # each sequence that runs may want a page soon
            spare = min(len(self._running) + len(self._prefill), 1 + self.pool.pages // 16)
            self.pool.share(shared)
            if self.pool.free < needed + spare:
                self.pool.release(shared)
                return
            del self._waiting[start]
            group.members.pop(0)
            lead.pages = shared + self.pool.take(needed)
            lead.computed = len(shared) * self.pool.size
            lead.known = len(shared)
            lead.request.cached = max(lead.request.cached, lead.computed)
            lead.row, lead.state = heapq.heappop(self._rows), "prefill"
            budget -= self._chunk(plan, group, lead, budget)
            if lead.state == "prefill":
                self._prefill.append((group, lead))

    def _chunk(self, plan: Plan, group: _Group, lead: Sequence, budget: int) -> int:
        """One piece of a sequence's known tokens, as long as the budget lets it be; returns its length."""
        start, stop = lead.computed, min(len(lead.tokens), lead.computed + budget)
        chunk = Chunk(lead, start, stop, last=stop == len(lead.tokens))
        plan.chunks.append(chunk)
        lead.computed = stop
        if chunk.last:
            lead.known = self.pool.remember(lead.root, lead.tokens, lead.pages, lead.known)
            self._fork(chunk, group)
            self._start(lead)
            self._requeue(group)
        return stop - start

    def _fork(self, chunk: Chunk, group: _Group) -> None:
        """Let as many of the group go on from here as there are rows and pages for."""
        lead = chunk.sequence
        full, rest = divmod(len(lead.tokens), self.pool.size)
        while group.members and self._rows and self.pool.free >= (1 if rest else 0):
            sequence = group.members.pop(0)
            fork = Fork(sequence)
            self.pool.share(lead.pages[:full])
            sequence.pages = lead.pages[:full]
            if rest:
                fork.source, fork.target = lead.pages[full], self.pool.take(1)[0]
                sequence.pages = [*sequence.pages, fork.target]
            sequence.computed, sequence.known = lead.computed, lead.known
            sequence.row = heapq.heappop(self._rows)
            chunk.forks.append(fork)
            self._start(sequence)

    def _start(self, sequence: Sequence) -> None:
        """A token of the sequence is on its way."""
        sequence.state = "running"
        sequence.length = len(sequence.tokens) + 1
        self._running.append(sequence)
