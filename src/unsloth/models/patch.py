"""Replacements of one model's parts, and lists of them that are applied and undone as a whole.

A replacement changes one object, never a class, a module or a function of another library. What :class:`ForwardSwap`
puts in is a function of a module of :mod:`unsloth.layers`, bound to the instance: a copy of the model is bound to its
own modules.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MethodType
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from unsloth.core.errors import PlanError, UnslothError
from unsloth.layers import packed_attention
from unsloth.layers.fast import ATTRIBUTE, Fast, has_foreign_forward, is_swapped


class Replacement(Protocol):
    """One entry of a plan.

    Attributes:
        path: Of the part of the model, as ``get_submodule`` takes it.
        current: What is there.
        new: What comes in.
        reason: Why.
    """

    path: str
    current: str
    new: str
    reason: str

    def apply(self) -> None:
        """Put it in; raise :class:`PlanError`, and change nothing, where the part is not what it was."""

    def undo(self) -> None:
        """Take it out; raise :class:`PlanError`, and change nothing, where someone has wrapped it since."""


@dataclass(frozen=True)
class LeftAlone:
    """A part of a model that a plan does not touch.

    Attributes:
        path: Of the part.
        what: What it is.
        why: Why it stays.
    """

    path: str
    what: str
    why: str


@dataclass(eq=False)
class ForwardSwap:
    """Another forward for one module.

    Attributes:
        path: Of the module.
        module: The instance.
        function: ``forward`` of a module of :mod:`unsloth.layers`.
        fast: Its options and counters.
        new: What comes in.
        reason: Why.
    """

    path: str
    module: torch.nn.Module
    function: Callable[..., Any]
    fast: Fast
    new: str
    reason: str
    current: str = field(init=False)

    def __post_init__(self) -> None:
        kind = type(self.module)
        self.current = f"lora.{kind.__name__}" if kind.__module__.startswith("peft.") else kind.__name__

    @property
    def applied(self) -> bool:
        """Whether the module has this forward now."""
        return getattr(self.module.__dict__.get("forward"), "__func__", None) is self.function

    def apply(self) -> None:
        """See :class:`Replacement`."""
        if has_foreign_forward(self.module) or is_swapped(self.module):
            raise PlanError(
                f"the forward of {self.path} has been replaced already",
                got=self.module.__dict__["forward"],
                do="Undo that first: a plan replaces only what a model's class defines.",
            )
        setattr(self.module, ATTRIBUTE, self.fast)
        self.module.forward = MethodType(self.function, self.module)

    def undo(self) -> None:
        """See :class:`Replacement`; nothing happens where it is not applied."""
        if has_foreign_forward(self.module):
            raise PlanError(
                f"the forward of {self.path} was wrapped after the plan was applied",
                got=self.module.__dict__["forward"],
                do="Take that wrapper off first (for instance accelerate's hooks, or a profiler's).",
            )
        if self.applied:
            del self.module.forward
            delattr(self.module, ATTRIBUTE)


@dataclass(eq=False)
class AttentionSwap:
    """:mod:`unsloth.layers.packed_attention` for one model, by its name in transformers' attention interface.

    Attributes:
        model: The model.
        path: Of the module that has the configuration: empty, the model itself.
        new: Name of the function.
        reason: Why.
        current: Name of the function that is there.
    """

    model: PreTrainedModel
    path: str = ""
    new: str = packed_attention.NAME
    reason: str = "packed documents without a mask over all pairs"
    current: str = field(init=False)

    def __post_init__(self) -> None:
        self.current = self.model.config._attn_implementation

    @property
    def applied(self) -> bool:
        """Whether the model is set to it now."""
        return self.model.config._attn_implementation == self.new

    def apply(self) -> None:
        """See :class:`Replacement`; nothing happens where it is applied, as on a model out of a pickle."""
        if self.applied:
            return
        if self.model.config._attn_implementation != self.current:
            raise PlanError(
                "the attention implementation was changed after the plan was made",
                got=self.model.config._attn_implementation,
                do="Make a new plan.",
            )
        self.model.set_attn_implementation(self.new)

    def undo(self) -> None:
        """See :class:`Replacement`; a choice that the user has made since is kept."""
        if self.applied:
            self.model.set_attn_implementation(self.current)


@dataclass(eq=False)
class PatchPlan:
    """What is replaced in one model, and what is left alone.

    ``print(plan)`` shows it as a table, like parts of all blocks in one line, with the number of calls so far that
    took the fast path and those that did not.

    Attributes:
        model: Name of the model's class.
        family: Name of its spec, or None.
        replacements: In the order in which they are applied.
        left_alone: What stays.
    """

    model: str
    family: str | None
    replacements: tuple[Replacement, ...]
    left_alone: tuple[LeftAlone, ...] = ()

    def __post_init__(self) -> None:
        counts = Counter(replacement.path for replacement in self.replacements)
        twice = [path for path, count in counts.items() if count > 1]
        if twice:
            raise PlanError(
                "two replacements want the same part of the model", got=twice[:3], do="Leave one of them out."
            )

    @property
    def applied(self) -> bool:
        """Whether all replacements that can tell are in place."""
        states = [getattr(replacement, "applied", True) for replacement in self.replacements]
        return bool(states) and all(states)

    def apply(self) -> None:
        """Put every replacement in, or none.

        Raises:
            PlanError: A part is not what it was when the plan was made.
        """
        _all_or_none(self.replacements, lambda r: r.apply(), lambda r: r.undo())

    def undo(self) -> None:
        """Take every replacement out, or none.

        Raises:
            PlanError: Someone wrapped one of them after the plan was applied.
        """
        states = [r for r in reversed(self.replacements) if getattr(r, "applied", True)]
        _all_or_none(_check_unwrapped(self.replacements, states), lambda r: r.undo(), lambda r: r.apply())

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """The model as it was before the plan, for the length of a block; for calibration hooks and the like."""
        was_applied = self.applied
        if was_applied:
            self.undo()
        try:
            yield
        finally:
            if was_applied:
                self.apply()

    def __str__(self) -> str:
        """The table."""
        state = "applied" if self.applied else "not applied" if self.replacements else "nothing to replace"
        lines = [f"Plan for {self.model} (family {self.family or 'without a spec'}, {state})"]
        lines += _table(("path", "what is there", "what comes in", "why", "calls"), _rows(self.replacements))
        lines.append("Left alone")
        alone = [(_pattern(part.path), part.path, part.what, part.why) for part in self.left_alone]
        lines += _table(("path", "what is there", "why"), _merged(alone))
        return "\n".join(lines)


def _check_unwrapped(replacements: Sequence[Replacement], applied: Sequence[Replacement]) -> Sequence[Replacement]:
    """``applied`` and those that were wrapped since, whose ``undo`` says so."""
    wrapped = [r for r in replacements if isinstance(r, ForwardSwap) and has_foreign_forward(r.module)]
    return [*wrapped, *applied]


def _all_or_none(
    replacements: Sequence[Replacement],
    do: Callable[[Replacement], None],
    reverse: Callable[[Replacement], None],
) -> None:
    done: list[Replacement] = []
    try:
        for replacement in replacements:
            do(replacement)
            done.append(replacement)
    except UnslothError:
        for replacement in reversed(done):
            reverse(replacement)
        raise


def _rows(replacements: Sequence[Replacement]) -> list[tuple[str, ...]]:
    entries = [(_pattern(r.path), r.path, r.current, r.new, r.reason) for r in replacements]
    merged = _merged(entries)
    calls: dict[tuple[str, ...], list[Fast]] = {}
    for entry, replacement in zip(entries, replacements, strict=True):
        fast = getattr(replacement, "fast", None)
        calls.setdefault((entry[0], *entry[2:]), []).extend([fast] if isinstance(fast, Fast) else [])
    return [(*row, _calls(found)) for row, found in zip(merged, calls.values(), strict=True)]


def _calls(states: Sequence[Fast]) -> str:
    """Such as "24, partly 4 (dropout), original 2 (a merged adapter)"."""
    if not states:
        return ""
    text = str(sum(state.calls for state in states))
    for word in ("partly", "declined"):
        reasons: Counter[str] = Counter()
        for state in states:
            reasons.update(getattr(state, word))
        if reasons:
            text += f", {word} {sum(reasons.values())} ({'; '.join(reasons)})"
    return text


def _pattern(path: str) -> str:
    """The path with its numbers left out."""
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", path)


def _merged(entries: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Entries (pattern, path, *more) with the same pattern and the same more as one row (paths, *more)."""
    paths: dict[tuple[str, ...], list[str]] = {}
    for pattern, path, *more in entries:
        paths.setdefault((pattern, *more), []).append(path or "(model)")
    return [(_range(key[0], found), *key[1:]) for key, found in paths.items()]


def _range(pattern: str, paths: Sequence[str]) -> str:
    """``model.layers.{0..3}.mlp`` for paths that differ in one number; the pattern for others."""
    if len(paths) == 1:
        return paths[0]
    numbers = [int(n) for path in paths for n in re.findall(r"(?:^|\.)(\d+)(?=\.|$)", path)]
    consecutive = numbers == list(range(numbers[0], numbers[0] + len(paths)))
    text = f"{numbers[0]}..{numbers[-1]}" if consecutive else ",".join(map(str, numbers))
    return pattern.replace("*", "{" + text + "}", 1) if len(numbers) == len(paths) else pattern


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    return [
        "  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in (header, *rows)
    ]
