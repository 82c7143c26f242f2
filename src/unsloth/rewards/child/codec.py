"""Plain values over the boundary: exact builtin types in, JSON out, and back; nothing that can run code.

The child writes JSON by itself (the ``json`` package costs more than the rest of its start); the host reads it with
``json`` and rebuilds the types that JSON lacks. A tagged value is an object of one key: ``t`` tuple, ``s`` set,
``f`` frozenset, ``d`` dict as a flat list of keys and values, ``b`` bytes as Latin-1 text, ``i`` an integer in
hexadecimal.

Sent: ``None``, ``bool``, ``int``, ``float``, ``str``, ``bytes``, ``list``, ``tuple``, ``set``, ``frozenset``,
``dict``. Subclasses are refused, since their methods are code of whoever wrote them.
"""

from __future__ import annotations

TYPE_CHECKING = False  # as type checkers read it; importing typing would triple the start of the child

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

MAX_DEPTH = 64
MAX_ALIKE = 64  # keys of one hash; floats that honest code may return share theirs with some thirty others
_SMALL = 2**61 - 1  # below it an integer is its own hash, so no short list of keys makes a dict quadratic
_SCALARS = frozenset({type(None), bool, int, float, str})
_NUMBERS = frozenset({int, float})


class NotPlainError(TypeError):
    """A value cannot cross the boundary."""


def encode(value: Any, quote: Callable[[str], str], depth: int = 0) -> str:
    """The value as JSON text.

    Args:
        value: What to send.
        quote: Turns a string into a JSON string of ASCII characters.
        depth: How many containers are around it.

    Raises:
        NotPlainError: It holds something that is not of an exact plain type, or is nested too deeply.
    """
    if depth > MAX_DEPTH:
        raise NotPlainError(f"nested more than {MAX_DEPTH} levels deep")
    kind = type(value)
    if kind is list:
        return f"[{_items(value, quote, depth)}]"
    if kind is tuple or kind is set or kind is frozenset:
        tag = "t" if kind is tuple else "s" if kind is set else "f"
        return f'{{"{tag}":[{_items(list(value), quote, depth)}]}}'
    if kind is dict:
        flat = [part for pair in value.items() for part in pair]
        return f'{{"d":[{_items(flat, quote, depth)}]}}'
    return _scalar(value, kind, quote)


def _items(values: list[Any], quote: Callable[[str], str], depth: int) -> str:
    kinds = set(map(type, values))
    if kinds <= _NUMBERS:
        text = ",".join(map(repr, values)) if int not in kinds or _all_small(values) else ""
        if (text or not values) and "n" not in text:  # "inf" and "nan" are written otherwise in JSON
            return text
    return ",".join([encode(value, quote, depth + 1) for value in values])


def _all_small(values: list[Any]) -> bool:
    return all(-_SMALL < value < _SMALL for value in values if type(value) is int)


def _scalar(value: Any, kind: type, quote: Callable[[str], str]) -> str:
    if value is None:
        return "null"
    if kind is bool:
        return "true" if value else "false"
    if kind is int:
        return repr(value) if -_SMALL < value < _SMALL else f'{{"i":"{value:x}"}}'
    if kind is float:
        text = repr(value)
        return {"inf": "Infinity", "-inf": "-Infinity", "nan": "NaN"}.get(text, text)
    if kind is str:
        return quote(value)
    if kind is bytes:
        return f'{{"b":{quote(value.decode("latin-1"))}}}'
    raise NotPlainError(f"a value of type {kind.__name__}")


def decode(value: Any, depth: int = 0) -> Any:
    """The value that parsed JSON stands for; every object in it is of an exact plain type.

    Raises:
        NotPlainError: It is not something that :func:`encode` writes.
    """
    if depth > 2 * MAX_DEPTH:
        raise NotPlainError("nested too deeply")
    if type(value) is list:
        if set(map(type, value)) <= _SCALARS:
            return value
        return [decode(item, depth + 1) for item in value]
    if type(value) is not dict:
        return value
    if len(value) != 1:
        raise NotPlainError("an object without a tag")
    ((tag, content),) = value.items()
    if tag in _TEXT_TAGS and type(content) is str:
        return _TEXT_TAGS[tag](content)
    if tag in _LIST_TAGS and type(content) is list:
        return _LIST_TAGS[tag](decode(content, depth + 1))
    raise NotPlainError(f"an unknown tag {str(tag)[:20]!r}")


def _hexadecimal(text: str) -> int:
    try:
        return int(text, 16)
    except ValueError:
        raise NotPlainError("not a hexadecimal integer") from None


def _bytes(text: str) -> bytes:
    try:
        return text.encode("latin-1")
    except UnicodeEncodeError:
        raise NotPlainError("bytes above 255") from None


def _dict(flat: list[Any]) -> dict[Any, Any]:
    if len(flat) % 2:
        raise NotPlainError("a key without its value")
    return dict(zip(_keys(flat[::2]), flat[1::2], strict=True))


def _keys(values: list[Any]) -> list[Any]:
    """The values if all may be keys: hashable, and not made to collide, which would keep the host busy for long."""
    _check_keys(values)
    alike: dict[int, int] = {}
    for value in values:
        number = hash(value)
        alike[number] = alike.get(number, 0) + 1
    if alike and max(alike.values()) > MAX_ALIKE:
        raise NotPlainError(f"more than {MAX_ALIKE} keys of one hash")
    return values


def _check_keys(values: list[Any]) -> None:
    for value in values:
        kind = type(value)
        if kind is tuple or kind is frozenset:
            _check_keys(list(value))
        elif kind is int and not -_SMALL < value < _SMALL:
            raise NotPlainError("an integer of more than 60 bits as a key")
        elif kind not in _SCALARS and kind is not bytes:
            raise NotPlainError(f"a {kind.__name__} as a key")


_TEXT_TAGS: dict[str, Callable[[str], Any]] = {"i": _hexadecimal, "b": _bytes}
_LIST_TAGS: dict[str, Callable[[list[Any]], Any]] = {
    "t": tuple,
    "s": lambda values: set(_keys(values)),
    "f": lambda values: frozenset(_keys(values)),
    "d": _dict,
}


def plain(value: Any, depth: int = 0) -> Any:
    """An argument as exact plain types: subclasses become their base, arrays and tensors nested lists.

    Raises:
        NotPlainError: It has no plain form.
    """
    if depth > MAX_DEPTH:
        raise NotPlainError(f"nested more than {MAX_DEPTH} levels deep")
    kind = type(value)
    if kind in _SCALARS or kind is bytes:
        return value
    if isinstance(value, (list, tuple, set, frozenset)):
        base = next(base for base in (list, tuple, set, frozenset) if isinstance(value, base))
        if kind is list and set(map(type, value)) <= _SCALARS:
            return value
        return base(plain(item, depth + 1) for item in value)
    if isinstance(value, dict):
        return {plain(key, depth + 1): plain(item, depth + 1) for key, item in value.items()}
    if callable(getattr(value, "tolist", None)):  # NumPy arrays and scalars, PyTorch tensors
        return plain(value.tolist(), depth + 1)
    for base_scalar in (int, float, str):
        if isinstance(value, base_scalar):
            return base_scalar(value)
    if isinstance(value, (bytes, bytearray)):
        return bytes(value)
    raise NotPlainError(f"a value of type {kind.__name__}")
