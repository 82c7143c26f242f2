"""Which page of the cache belongs to whom: reference counts, and pages found again by the tokens they hold.

No tensors. A page holds the keys and values of ``size`` consecutive tokens. A full page is known by the tokens in it
and by the page before it, so a chain of pages is known by all tokens from the start (Kwon et al., 2023,
arXiv:2309.06180). Page 0 belongs to nobody: rows of a batch that are padding write there.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass


@dataclass
class _Known:
    """What a full page holds: the chain's node before it, its tokens, and its own node."""

    key: tuple[Hashable, tuple[int, ...]]
    node: int


class PagePool:
    """The pages of a cache.

    Args:
        pages: How many there are, page 0 included.
        size: Tokens of a page.
        reuse: Whether full pages are kept and found again.
    """

    def __init__(self, pages: int, size: int, reuse: bool = True) -> None:
        self.pages, self.size, self.reuse = pages, size, reuse
        self._empty = list(range(pages - 1, 0, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # known, but nobody's; the oldest first
        self._counts = [0] * pages
        self._known: dict[int, _Known] = {}
        self._by_key: dict[tuple[Hashable, tuple[int, ...]], int] = {}
        self._next_node = 0

    @property
    def free(self) -> int:
        """Pages that can be taken."""
        return len(self._empty) + len(self._idle)

    def take(self, count: int) -> list[int]:
        """``count`` pages, of which there must be as many free."""
        taken = []
        for _ in range(count):
            if self._empty:
                page = self._empty.pop()
            else:
                page, _ = self._idle.popitem(last=False)
                self._forget(page)
            self._counts[page] = 1
            taken.append(page)
        return taken

    def share(self, pages: Sequence[int]) -> None:
        """One more owner for each."""
        for page in pages:
            self._idle.pop(page, None)
            self._counts[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """One owner less; the last tokens of a chain are given up first."""
        for page in reversed(pages):
            self._counts[page] -= 1
            if self._counts[page] == 0:
                if page in self._known:
                    self._idle[page] = None
                else:
                    self._empty.append(page)

    def find(self, root: Hashable, tokens: Sequence[int]) -> list[int]:
        """The longest chain of known pages that holds the first of ``tokens``; they are not shared yet."""
        found: list[int] = []
        node: Hashable = root
        for start in range(0, len(tokens) - self.size + 1, self.size):
            page = self._by_key.get((node, tuple(tokens[start : start + self.size])))
            if page is None:
                break
            found.append(page)
            node = self._known[page].node
        return found

    def remember(self, root: Hashable, tokens: Sequence[int], pages: Sequence[int], known: int = 0) -> int:
        """Make full pages known.

        Args:
            root: Start of the chain: whatever else the keys and values depend on.
            tokens: Of the sequence.
            pages: Of the sequence; those that ``tokens`` fill are full.
            known: How many of its first pages are remembered already.

        Returns:
            How many are now. It stops at a page whose tokens another page holds already: the chain is that one's.
        """
        if not self.reuse or (known and pages[known - 1] not in self._known):
            return known
        node: Hashable = self._known[pages[known - 1]].node if known else root
        for i in range(known, len(tokens) // self.size):
            key = (node, tuple(tokens[i * self.size : (i + 1) * self.size]))
            if key in self._by_key:
                return i
            node = self._next_node
            self._known[pages[i]] = _Known(key, self._next_node)
            self._by_key[key] = pages[i]
            self._next_node += 1
        return len(tokens) // self.size

    def forget_all(self) -> None:
        """Forget what pages hold, as after a change of the weights."""
        self._by_key.clear()
        self._known.clear()
        self._empty += self._idle
        self._idle.clear()

    def _forget(self, page: int) -> None:
        known = self._known.pop(page)
        del self._by_key[known.key]
