"""M11: a chat template that reaches out of its sandbox, loops, or writes without end is stopped."""

import copy
import time

import pytest
from jinja2.exceptions import SecurityError

from unsloth.core.errors import TokenizerError, UnslothError
from unsloth.data.conversation import Conversation
from unsloth.data.encode import PrepareOptions
from unsloth.data.prepare import prepare
from unsloth.data.render import ChatRenderer
from unsloth.data.template_engine import CompiledTemplate, LimitError, RenderLimits

MESSAGES = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
LIMITS = RenderLimits(seconds=2.0, characters=1_000_000, steps=200_000)

ESCAPES = [
    "{{ lipsum.__globals__ }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(role='x') }}",
    "{{ raise_exception.__globals__ }}",
    "{{ '{0.__class__}'.format(messages) }}",
    "{{ (messages | attr('__class__')) }}",
    "{{ self.__init__.__globals__ }}",
]
BOMBS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
    "{% for a in range(90000) %}" + "x" * 1000 + "{% endfor %}",
    "{{ 'a' * 1000000000 }}",
    "{{ [0] * 1000000000 }}",
    "{{ 9 ** 99999999 }}",
    "{% set n = namespace(s='a') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "{% set n = namespace(s='a') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "{{ 'a' | center(1000000000) }}",
    "{{ 'a'.ljust(10000000000) }}",
    "{{ '%1000000000d' % 3 }}",
    "{{ '%*d' % (1000000000, 3) }}",
    "{{ '{:1000000000}'.format(3) }}",
    "{% macro f() %}{% for a in range(90000) %}" + "x" * 1000 + "{% endfor %}{% endmacro %}{{ f() }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_reaching_out_is_a_security_error(source):
    with pytest.raises(SecurityError):
        CompiledTemplate(source, LIMITS).render(MESSAGES, {})


@pytest.mark.parametrize("source", BOMBS)
def test_endless_work_is_stopped(source):
    template = CompiledTemplate(source, LIMITS)
    began = time.monotonic()
    with pytest.raises(LimitError):
        template.render(MESSAGES, {})
    assert time.monotonic() - began < LIMITS.seconds + 3


def test_recursion_without_end_names_the_row(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"
    with pytest.raises(UnslothError, match="row 3"):
        ChatRenderer(tokenizer).render(Conversation(MESSAGES), 3)


@pytest.mark.parametrize("source", [ESCAPES[0], BOMBS[3]])
def test_the_preparation_of_rows_is_protected(source, tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = source
    with pytest.raises(TokenizerError, match="row 0.*(SecurityError|LimitError).*get_chat_template"):
        prepare([{"messages": MESSAGES}], tokenizer, PrepareOptions(max_length=64))


def test_no_valid_template(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{% for %}"
    with pytest.raises(TokenizerError, match="no valid Jinja"):
        prepare([{"messages": MESSAGES}], tokenizer, PrepareOptions(max_length=64))
