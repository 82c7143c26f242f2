"""What a chat template writes around messages, found out once for each sequence of roles instead of for each row.

A template is run with stand-ins for the messages' texts. A stand-in may be written out, joined to other text, stripped
and asked a few questions ("is there a ``</think>`` in you?"), whose answers become conditions on the texts of a row.
Anything else that a template does with one (splitting, slicing, counting, JSON) ends the attempt, and the row is
rendered as it is. So an outline, filled with texts that meet its conditions, equals the rendering character for
character: the template took the same path and wrote the same pieces. The idea is symbolic execution (King, 1976), along
one path.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import wraps
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.runtime import Macro, Undefined
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from unsloth.data.template_engine import Loops, Meter, Rendered, RenderLimits, Sandbox

_STAND_IN = "\ufdd0\ufdd1"  # code points that Unicode keeps from being characters
_STRIPS = ("strip", "lstrip", "rstrip")
_QUESTIONS = ("startswith", "endswith")
_COMPARE = "__compare"
_KEEPS_TEXT = {"default", "d", "string"}
_TAKES_LISTS = {
    *("list", "first", "last", "reverse", "length", "count", "items", "default", "d"),
    *("selectattr", "rejectattr", "map"),
}
_TYPE_TESTS = {
    *("defined", "undefined", "none", "string", "mapping", "iterable", "sequence", "number", "boolean"),
    *("true", "false", "integer", "float", "callable"),
}
_COMPARISONS: Mapping[str, Callable[[Any, Any], Any]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "gt": operator.gt,
    "gteq": operator.ge,
    "lt": operator.lt,
    "lteq": operator.le,
    "in": lambda left, right: left in right,
    "notin": lambda left, right: left not in right,
}


class LookedInsideError(Exception):
    """A template did with a message's text what depends on the text in more than a simple condition."""


@dataclass(frozen=True)
class Slot:
    """Where the text of a message goes.

    Attributes:
        message: Which message.
        strips: The ways in which it is stripped first: a method's name and its argument.
    """

    message: int
    strips: tuple[tuple[str, str | None], ...] = ()

    def fill(self, texts: Sequence[str]) -> str:
        """What stands here if the messages say ``texts``."""
        text = texts[self.message]
        for name, characters in self.strips:
            text = getattr(text, name)(characters)
        return text


@dataclass(frozen=True)
class Condition:
    """A question about a text, of which the answer must be no.

    Attributes:
        slot: The text.
        question: ``contains``, ``equals``, ``startswith``, ``endswith``, or ``vanishes`` (nothing is left of it).
        text: What it is asked for.
    """

    slot: Slot
    question: str
    text: str = ""

    def holds(self, texts: Sequence[str]) -> bool:
        """Whether the answer is no for these messages."""
        given = self.slot.fill(texts)
        if self.question == "contains":
            return self.text not in given
        if self.question == "equals":
            return given != self.text
        if self.question == "vanishes":
            return given != ""
        return not getattr(given, self.question)(self.text)


@dataclass(frozen=True)
class Outline:
    """What a template makes of a sequence of roles.

    Attributes:
        pieces: What is written, in order: fixed text, or the text of a message.
        marks: ``(piece, message)``: from this piece on, the loop over the messages stands at this message (-1: none).
        generated: ``(first piece, piece after)`` of generation blocks.
        conditions: What must be true of the texts.
        clock: What the clock said, by the pattern it was read with.
    """

    pieces: tuple[str | Slot, ...]
    marks: tuple[tuple[int, int], ...]
    generated: tuple[tuple[int, int], ...]
    conditions: tuple[Condition, ...]
    clock: tuple[tuple[str, str], ...] = ()

    def holds(self, texts: Sequence[str]) -> bool:
        """Whether messages with these ``texts`` are rendered so, now."""
        if self.clock and any(datetime.now().strftime(pattern) != said for pattern, said in self.clock):
            return False
        return all(condition.holds(texts) for condition in self.conditions)

    def rendered(self, texts: Sequence[str]) -> Rendered:
        """The rendering of messages with these ``texts``, which must meet the conditions."""
        filled = [piece if isinstance(piece, str) else piece.fill(texts) for piece in self.pieces]
        starts = [0]
        for text in filled:
            starts.append(starts[-1] + len(text))
        ends = [starts[piece] for piece, _ in self.marks][1:] + [starts[-1]] * bool(self.marks)
        turns = [(number, starts[piece], end) for (piece, number), end in zip(self.marks, ends, strict=True)]
        generated = [(starts[first], starts[after]) for first, after in self.generated]
        return Rendered(
            "".join(filled),
            [turn for turn in turns if turn[0] >= 0 and turn[2] > turn[1]],
            [(start, end) for start, end in generated if end > start],
        )


class Tracer:
    """Finds the outlines of one template.

    Args:
        source: The template in Jinja.
        limits: What one rendering may use.

    Raises:
        jinja2.TemplateError: The source is not a template.
    """

    def __init__(self, source: str, limits: RenderLimits | None = None) -> None:
        self._recorder = _Recorder(limits or RenderLimits())
        environment = _Tracing(self._recorder)
        tree = _Comparisons().visit(Loops().visit(environment.parse(source)))
        tree.set_environment(environment)
        self._template = environment.from_string(tree)

    def trace(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> Outline | None:
        """The outline of ``messages``, or None if their texts matter for more than conditions.

        Args:
            messages: With any text as ``content``; one without a character is a case of its own.
            variables: The template's other variables.
        """
        recorder = self._recorder
        conditions: list[Condition] = []
        stand_ins = [
            {**message, "content": _Text((Slot(i),), conditions) if message["content"] else ""}
            for i, message in enumerate(messages)
        ]
        recorder.start(stand_ins)
        recorder.clock.clear()
        pieces: list[str | Slot] = []
        template = self._template
        try:
            for piece in template.root_render_func(template.new_context({"messages": stand_ins, **variables})):
                pieces += piece.parts if isinstance(piece, _Text) else (piece,)
                recorder.position = len(pieces)
        except (LookedInsideError, jinja2.TemplateError, TypeError, ValueError, AttributeError, LookupError):
            return None
        if any(isinstance(piece, str) and _STAND_IN in piece for piece in pieces):
            return None
        generated = tuple((start, end) for start, end in recorder.generated)
        return Outline(
            tuple(pieces),
            tuple(recorder.marks),
            generated,
            tuple(dict.fromkeys(conditions)),
            tuple(recorder.clock.items()),
        )


def _refuse(*_: Any) -> Any:
    raise LookedInsideError


class _Text(str):
    """Stands for text with the texts of messages in it; hides its own."""

    parts: tuple[str | Slot, ...]
    conditions: list[Condition]

    def __new__(cls, parts: tuple[str | Slot, ...], conditions: list[Condition]) -> _Text:
        text = super().__new__(cls, _STAND_IN)
        text.parts, text.conditions = parts, conditions
        return text

    def slot(self) -> Slot:
        """The only part, which must be a message's text."""
        if len(self.parts) == 1 and isinstance(self.parts[0], Slot):
            return self.parts[0]
        raise LookedInsideError

    def no(self, question: str, text: Any, slot: Slot | None = None) -> bool:
        """Ask ``question``, and make it a condition that the answer is no."""
        if type(text) is not str:
            raise LookedInsideError
        self.conditions.append(Condition(slot or self.slot(), question, text))
        return False

    def stripped(self, name: str, characters: Any = None) -> _Text:
        if characters is not None and type(characters) is not str:
            raise LookedInsideError
        parts = list(self.parts)
        if len(parts) == 1:
            parts[0] = self._end(parts[0], name, characters)
        else:
            if name != "rstrip":
                parts[0] = self._end(parts[0], "lstrip", characters)
            if name != "lstrip":
                parts[-1] = self._end(parts[-1], "rstrip", characters)
            for part in (parts[0], parts[-1]):  # else the next part would be stripped too
                if isinstance(part, Slot):
                    self.no("vanishes", "", part)
                elif not part:
                    raise LookedInsideError
        return _Text(tuple(parts), self.conditions)

    @staticmethod
    def _end(part: str | Slot, name: str, characters: str | None) -> str | Slot:
        if isinstance(part, str):
            return str(getattr(part, name)(characters))
        return Slot(part.message, (*part.strips, (name, characters)))

    def __bool__(self) -> bool:
        if any(isinstance(part, str) and part for part in self.parts):
            return True
        if self.slot().strips:
            self.no("vanishes", "")
        return True  # a text without a character has no stand-in

    def __str__(self) -> str:
        return self

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __len__ = __iter__ = __getitem__ = __contains__ = __hash__ = _refuse  # type: ignore[assignment]
    __add__ = __mul__ = __rmul__ = __mod__ = __format__ = _refuse


@dataclass(frozen=True)
class _Method:
    """A method of a stand-in that a template may call."""

    text: _Text
    name: str

    def __call__(self, *arguments: Any) -> Any:
        if self.name in _STRIPS:
            return self.text.stripped(self.name, *arguments)
        if len(arguments) != 1:
            raise LookedInsideError
        return self.text.no(self.name, arguments[0])


class _Recorder(Meter):
    """Positions are numbers of pieces here, not of characters."""

    def __init__(self, limits: RenderLimits) -> None:
        self.clock: dict[str, str] = {}
        super().__init__(limits)

    def read_clock(self, pattern: str) -> str:
        self.clock[pattern] = datetime.now().strftime(pattern)
        return self.clock[pattern]

    def finalize(self, value: Any) -> Any:
        if not isinstance(value, str) and _holds(value):
            raise LookedInsideError
        return value


class _Comparisons(NodeTransformer):
    """Makes each comparison a call that can see stand-ins."""

    def visit_Compare(self, node: nodes.Compare) -> nodes.Expr:  # noqa: N802
        self.generic_visit(node)
        first = node.ops[0]
        names = [nodes.Const(operand.op) for operand in node.ops]
        return nodes.Filter(node.expr, _COMPARE, [first.expr, *names], [], None, None)


class _Tracing(Sandbox):
    """The sandbox of templates, in which stand-ins keep what they stand for to themselves."""

    @staticmethod
    def concat(parts: Any) -> str:  # type: ignore[override]
        return _joined(list(parts))

    def __init__(self, meter: _Recorder) -> None:
        super().__init__(meter)
        self.filters = {name: _guarded_filter(name, function) for name, function in self.filters.items()}
        self.filters["__concat"] = _concatenated
        self.filters[_COMPARE] = _compare
        tests: dict[str, Any] = self.tests
        self.tests = {name: _guarded_test(name, function) for name, function in tests.items()}
        self.globals["strftime_now"] = meter.read_clock

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        if isinstance(__obj, _Method):
            return __obj(*args)
        free = isinstance(__obj, Macro) or __obj is Namespace or __obj is dict
        is_meter = getattr(__obj, "__self__", None) is __self.meter
        if not free and not is_meter and any(map(_holds, (*args, *_given(kwargs)))):
            raise LookedInsideError
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if isinstance(left, _Text) or isinstance(right, _Text):
            if operator == "+" and isinstance(left, str) and isinstance(right, str):
                return _joined([left, right])
            raise LookedInsideError
        if operator != "+" and (_holds(left) or _holds(right)):
            raise LookedInsideError
        return super().call_binop(context, operator, left, right)

    def getattr(self, obj: Any, attribute: str) -> Any:
        if not isinstance(obj, _Text):
            return super().getattr(obj, attribute)
        if attribute in (*_STRIPS, *_QUESTIONS):
            return _Method(obj, attribute)
        raise LookedInsideError

    def getitem(self, obj: Any, argument: Any) -> Any:
        if isinstance(obj, _Text) or isinstance(argument, _Text):
            raise LookedInsideError
        return super().getitem(obj, argument)

    def _check_result(self, value: Any) -> Any:
        return value if isinstance(value, _Text) else super()._check_result(value)


def _given(kwargs: Mapping[str, Any]) -> list[Any]:
    """The arguments that the template passes itself; Jinja adds the variables of the loop."""
    return [value for name, value in kwargs.items() if name not in ("_loop_vars", "_block_vars")]


def _concatenated(parts: Sequence[Any]) -> str:
    return _joined([part if isinstance(part, _Text) else _plain(part) for part in parts])


def _plain(value: Any) -> str:
    if _holds(value):
        raise LookedInsideError
    return str(value)


def _joined(parts: Sequence[str]) -> str:
    """One text of several, a stand-in if one of them is."""
    stand_in = next((part for part in parts if isinstance(part, _Text)), None)
    if stand_in is None:
        return "".join(parts)
    pieces: list[str | Slot] = []
    for part in parts:
        pieces += part.parts if isinstance(part, _Text) else (part,)
    return _Text(tuple(pieces), stand_in.conditions)


def _holds(value: Any) -> bool:
    """Whether a stand-in may be in ``value``."""
    if isinstance(value, _Text):
        return True
    if value is None or isinstance(value, str | int | float | Undefined) or callable(value):
        return False
    if isinstance(value, Mapping):
        return any(_holds(item) for pair in value.items() for item in pair)
    if isinstance(value, list | tuple):
        return any(map(_holds, value))
    return True  # iterators and what else a template can have made


def _guarded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    passed = 1 if hasattr(function, "jinja_pass_arg") else 0  # the environment or the context comes first

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        value, more = args[passed], (*args[passed + 1 :], *kwargs.values())
        if isinstance(value, _Text):
            if name == "trim":
                return value.stripped("strip", *more)
            if name in _KEEPS_TEXT:
                return value
            raise LookedInsideError
        if name not in _TAKES_LISTS and any(map(_holds, (value, *more))):
            raise LookedInsideError
        return function(*args, **kwargs)

    return call


def _guarded_test(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    passed = 1 if hasattr(function, "jinja_pass_arg") else 0

    @wraps(function)
    def call(*args: Any) -> Any:
        if isinstance(args[passed], _Text) and name in _TYPE_TESTS:
            return function(*args[:passed], "text")
        if name not in _TYPE_TESTS and any(map(_holds, args[passed:])):
            raise LookedInsideError
        return function(*args)

    return call


def _compare(left: Any, right: Any, name: str, *more: str) -> bool:
    """``left name right``; of a chain of comparisons nothing is known."""
    if more:
        raise LookedInsideError
    if not isinstance(left, _Text) and not isinstance(right, _Text):
        return bool(_COMPARISONS[name](left, right))
    if name in ("eq", "ne"):
        text, other = (left, right) if isinstance(left, _Text) else (right, left)
        is_text = isinstance(other, str) and text.no("equals", other)
        return is_text if name == "eq" else not is_text
    if name not in ("in", "notin"):
        raise LookedInsideError
    if isinstance(right, _Text):
        found = right.no("contains", left)
    elif isinstance(right, list | tuple):
        found = any(left.no("equals", other) for other in right)
    else:
        raise LookedInsideError
    return found if name == "in" else not found
