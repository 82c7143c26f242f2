"""Rendering chat templates: sandboxed, limited in time and output, and knowing which message wrote which characters.

A template comes with a model, so it is foreign code. It runs in Jinja's immutable sandbox, as in transformers, and
in addition under a :class:`RenderLimits`. To learn whose text is whose, every loop of the template is made to say
which item it is at; a loop over messages then tells the characters of one message from those of the next, for any
template, in one rendering.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import wraps
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

_LARGEST_NUMBER = 1_000_000  # above it, an argument is a way to fill the memory ("{:>1000000000}", center(10**9))
_MARK, _ENTER, _LEAVE = "__mark", "__enter", "__leave"
_WIDTH = re.compile(r"\d{7,}|\*")


class LimitError(SecurityError):
    """A template asked for more time or output than it may have."""


@dataclass(frozen=True)
class RenderLimits:
    """What one rendering may use.

    Attributes:
        seconds: Time.
        characters: Length of the output, and of any text on the way to it.
        steps: Loop iterations and calls together.
    """

    seconds: float = 5.0
    characters: int = 64_000_000
    steps: int = 2_000_000


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, and who wrote what.

    Attributes:
        text: The rendered conversation.
        turns: ``(message, start, end)``: characters ``[start, end)`` were written while a loop over the messages
            stood at this message. In order; text written outside such a loop is in none.
        generated: Characters within ``{% generation %}`` blocks, which some templates have around what the model
            is to write.
    """

    text: str
    turns: list[tuple[int, int, int]]
    generated: list[tuple[int, int]]


class Meter:
    """What the rendering under way has used, and where it stands."""

    def __init__(self, limits: RenderLimits) -> None:
        self.limits = limits
        self.start([])

    def start(self, messages: Sequence[Mapping[str, Any]]) -> None:
        """Forget the rendering before."""
        self.deadline = time.monotonic() + self.limits.seconds
        self.steps = self.emitted = self.position = 0
        self.number = {id(message): i for i, message in enumerate(messages)}
        self.marks: list[tuple[int, int]] = []
        self.generated: list[list[int]] = []

    def tick(self) -> None:
        """Count a step."""
        self.steps += 1
        if self.steps > self.limits.steps:
            raise LimitError(f"more than {self.limits.steps:,} loop iterations and calls")
        if time.monotonic() > self.deadline:
            raise LimitError(f"more than {self.limits.seconds:g} seconds")

    def allow(self, characters: int) -> None:
        """Raise :class:`LimitError` if a text may not be as long as this."""
        if characters > self.limits.characters:
            raise LimitError(f"a text of more than {self.limits.characters:,} characters")

    def emit(self, characters: int) -> None:
        """Count characters that are written."""
        self.emitted += characters
        self.allow(self.emitted)

    def finalize(self, value: Any) -> Any:
        """Called by Jinja for each value written, also inside macros, whose output is collected first."""
        if isinstance(value, str):
            self.emit(len(value))
        return value

    def mark(self, item: Any, weight: int) -> str:
        """A loop of the template begins with ``item``; its body writes at least ``weight`` characters."""
        self.tick()
        self.emit(weight)
        found = self.number.get(id(item))
        if found is not None:
            self.marks.append((self.position, found))
        return ""

    def leave(self, item: Any) -> str:
        """The loop is through with ``item``."""
        if self.marks and id(item) in self.number:
            self.marks.append((self.position, -1))
        return ""

    def generation(self, begins: bool) -> str:
        """A generation block begins or ends."""
        if begins:
            self.generated.append([self.position, self.position])
        elif self.generated:
            self.generated[-1][1] = self.position
        return ""

    def turns(self, length: int) -> list[tuple[int, int, int]]:
        """Which message wrote what of a text of this length."""
        ends = [position for position, _ in self.marks][1:] + [length] * bool(self.marks)
        spans = zip(self.marks, ends, strict=True)
        return [(number, start, end) for (start, number), end in spans if number >= 0 and end > start]


class _Generation(Extension):
    """``{% generation %}`` … ``{% endgeneration %}``, as transformers has it."""

    tags = {"generation"}

    def parse(self, parser: Any) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begins, ends = (_call_output(_ENTER, [nodes.Const(flag)], line) for flag in (True, False))
        return [begins, *body, ends]


class Loops(NodeTransformer):
    """Makes each loop say which item it is at."""

    def visit_For(self, node: nodes.For) -> nodes.For:  # noqa: N802
        """Put a mark at the beginning and at the end of the loop's body."""
        self.generic_visit(node)
        target = node.target
        item: nodes.Expr = nodes.Const(None)
        if isinstance(target, nodes.Name):
            item = nodes.Name(target.name, "load")
        weight = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        begin = _call_output(_MARK, [item, nodes.Const(weight)], node.lineno)
        end = _call_output(_LEAVE, [item], node.lineno)
        node.body = [begin, *node.body, end]
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:  # noqa: N802
        """Make ``a ~ b`` a call that can be metered."""
        self.generic_visit(node)
        return nodes.Filter(nodes.List(node.nodes), "__concat", [], [], None, None)


def _call_output(name: str, arguments: list[nodes.Expr], line: int) -> nodes.Output:
    call = nodes.Call(nodes.Name(name, "load"), arguments, [], None, None)
    return nodes.Output([call], lineno=line)


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's immutable sandbox with a meter on calls, operators, filters and loops."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, meter: Meter) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
            finalize=meter.finalize,
        )
        self.meter = meter
        self.filters = {name: self._limited(function) for name, function in self.filters.items()}
        self.filters["tojson"] = _to_json
        self.filters["__concat"] = self._concatenate
        self.globals.update(
            {
                "raise_exception": _raise_exception,
                "strftime_now": lambda pattern: datetime.now().strftime(pattern),
                "lipsum": lambda *_: "",
                _MARK: meter.mark,
                _LEAVE: meter.leave,
                _ENTER: meter.generation,
            }
        )

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Call something of the template's, metered."""
        if getattr(__obj, "__self__", None) is __self.meter:
            return __obj(*args)
        __self.meter.tick()
        __self._check_arguments((*args, *kwargs.values()))
        subject = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None)  # the sandbox wraps str.format
        if isinstance(subject, str) and getattr(__obj, "__name__", "") in ("format", "format_map"):
            __self._check_width(subject)
        return __self._check_result(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Apply an operator, if its result is not too large."""
        if operator == "+":
            if isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
                self.meter.allow(len(left) + len(right))
        elif operator == "%":
            if isinstance(left, str):
                self._check_width(left)
        elif isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * (abs(right) if operator == "**" else 1)
            self.meter.allow(bits + right.bit_length())
        elif operator == "*":
            sequence, times = (left, right) if isinstance(right, int) else (right, left)
            if isinstance(times, int) and isinstance(sequence, str | list | tuple):
                self.meter.allow(len(sequence) * max(times, 0))
        return self.binop_table[operator](left, right)

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        """Refuse at once; Jinja would only complain when the value is used."""
        raise SecurityError(f"access to attribute {attribute!r} of {type(obj).__name__!r} object is unsafe.")

    def _concatenate(self, parts: list[Any]) -> str:
        texts = [str(part) for part in parts]
        self.meter.allow(sum(map(len, texts)))
        return "".join(texts)

    def _check_arguments(self, values: Sequence[Any]) -> None:
        for value in values:
            if isinstance(value, int) and abs(value) > _LARGEST_NUMBER:
                raise LimitError(f"a call with the number {value}")

    def _check_width(self, pattern: str) -> None:
        if _WIDTH.search(pattern):
            raise LimitError(f"the format {pattern[:40]!r}")

    def _check_result(self, value: Any) -> Any:
        if isinstance(value, str | list | tuple):
            self.meter.allow(len(value))
        return value

    def _limited(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            self.meter.tick()
            self._check_arguments((*args, *kwargs.values()))
            return self._check_result(function(*args, **kwargs))

        return call


class CompiledTemplate:
    """A chat template, ready to render; one rendering at a time.

    Args:
        source: The template in Jinja.
        limits: What one rendering may use.

    Raises:
        jinja2.TemplateError: The source is not a template.
    """

    def __init__(self, source: str, limits: RenderLimits | None = None) -> None:
        self._meter = Meter(limits or RenderLimits())
        environment = Sandbox(self._meter)
        tree = Loops().visit(environment.parse(source))
        tree.set_environment(environment)
        self._template = environment.from_string(tree)

    def render(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> Rendered:
        """Render ``messages`` with the template's other ``variables``.

        Raises:
            LimitError: It took more than its limits.
            SecurityError: It tried what the sandbox forbids.
            Exception: Whatever else the template raises on these messages.
        """
        meter = self._meter
        meter.start(messages)
        pieces = []
        for piece in self._pieces({"messages": messages, **variables}):
            pieces.append(piece)
            meter.position += len(piece)
            meter.allow(meter.position)
        text = "".join(pieces)
        generated = [(start, end) for start, end in meter.generated if end > start]
        return Rendered(text, meter.turns(len(text)), generated)

    def _pieces(self, variables: Mapping[str, Any]) -> Iterator[str]:
        template = self._template
        return template.root_render_func(template.new_context(dict(variables)))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as transformers' filter of this name writes it: without HTML escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
