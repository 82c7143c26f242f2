"""What llama.cpp's own template engine does not have of Jinja's Python, found in a chat template."""

from __future__ import annotations

import re

from jinja2 import Environment, TemplateSyntaxError, nodes

# Methods of Python's strings and lists that templates call and llama.cpp's engine (common/jinja, August 2026) lacks.
_MISSING = frozenset(
    "center count encode expandtabs extend find index insert isalpha isdigit isspace isupper ljust partition remove "
    "removeprefix removesuffix rfind rindex rjust rpartition setdefault splitlines swapcase translate update "
    "zfill".split()
)
_GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")  # a tag of transformers'
_POSITIONAL = ("split", "rsplit", "replace")  # take no arguments by name there


def limits(template: str | None) -> list[str]:
    """A sentence if llama.cpp's engine cannot render the template as it stands.

    Programs that read the template out of the file by it (llama.cpp's server and what is built on it) fail on such a
    call where a conversation reaches it.

    Args:
        template: In Jinja.
    """
    if not template:
        return []
    try:
        tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_GENERATION.sub("", template))
    except TemplateSyntaxError:  # said in full where the template is rendered
        return []
    found: set[str] = set()
    for call in tree.find_all(nodes.Call):
        if not isinstance(call.node, nodes.Getattr):
            continue
        if call.node.attr in _MISSING:
            found.add(f".{call.node.attr}()")
        elif call.node.attr in _POSITIONAL and call.kwargs:
            found.add(f".{call.node.attr}({call.kwargs[0].key}=...)")
    if not found:
        return []
    return [
        f"the chat template calls {', '.join(sorted(found))}, which llama.cpp's template engine does not have; write "
        "it otherwise, such as .split(x, 1) without names of arguments"
    ]
