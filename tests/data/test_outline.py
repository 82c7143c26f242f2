"""Outlines against the renderings that they stand for, character by character, for every template there is."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import trl

import unsloth.data.templates as own
from unsloth.data.outline import Tracer
from unsloth.data.template_engine import CompiledTemplate

OWN = sorted(Path(own.__file__).parent.glob("*.jinja"))
FOREIGN = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
VARIABLES = {"bos_token": "<s>", "eos_token": "</s>", "tools": None, "documents": None, "add_generation_prompt": False}
ROLES = [["user", "assistant"], ["system", "user", "assistant"], ["user", "assistant"] * 3]
TEXTS = [
    *(
        "hi",
        " a ",
        "\n",
        "  ",
        "ü漢😀",
        "{x} %s",
        "<think>x</think> y",
        "</think>",
        "<think>\n\n</think>\n\n",
        "\ufdd0",
    ),
    *("<tool_response>x</tool_response>", "<|im_end|>", "a\n\n", "[INST]", "a </think> b </think> c", "\u0301e"),
]


def talks(roles, seed=0, count=12):
    draw = random.Random(seed)
    for _ in range(count):
        yield [{"role": role, "content": draw.choice(TEXTS)} for role in roles]


def outline_of(source, roles):
    return Tracer(source).trace([{"role": role, "content": "x"} for role in roles], VARIABLES)


@pytest.mark.parametrize("file", [*OWN, *FOREIGN], ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_a_filled_outline_is_the_rendering(file):
    source = file.read_text(encoding="utf-8")
    reference, tracer = CompiledTemplate(source), Tracer(source)
    for roles in ROLES:
        outline = tracer.trace([{"role": role, "content": "x"} for role in roles], VARIABLES)
        if outline is None:
            continue
        for talk in talks(roles, len(source)):
            texts = [message["content"] for message in talk]
            if outline.holds(texts):
                assert outline.rendered(texts) == reference.render(talk, VARIABLES)


@pytest.mark.parametrize("file", OWN, ids=lambda file: file.stem)
def test_every_documented_template_has_an_outline_that_holds_for_plain_texts(file):
    for roles in ROLES:
        outline = outline_of(file.read_text(encoding="utf-8"), roles)
        assert outline is not None
        assert outline.holds(["plain text"] * len(roles))


@pytest.mark.parametrize(
    "expression",
    [
        "m.content | upper",
        "m.content | length",
        "m.content | tojson",
        "m | tojson",
        "m",
        "messages | map(attribute='content') | join(',')",
        "m.content[0]",
        "m.content[1:]",
        "m.content.split('a')",
        "m.content * 2",
        "'%s!' % m.content",
        "'{}!'.format(m.content)",
        "', '.join([m.content])",
        "m.content | replace('a', 'b')",
        "m.content < 'b'",
        "m.content in 'abc'",
        "'a' < m.content < 'c'",
        "messages ~ ''",
        "m.items()",
        "m.content | trim | title",
    ],
)
def test_a_template_that_looks_inside_has_none(expression):
    source = "{% for m in messages %}{{ " + expression + " }}{% endfor %}"
    CompiledTemplate(source).render([{"role": "user", "content": "abc"}], VARIABLES)  # a template that works
    assert outline_of(source, ["user"]) is None


@pytest.mark.parametrize(
    ("body", "holds", "fails"),
    [
        ("{% if '</think>' in m.content %}T{% endif %}{{ m.content }}", "a", "a</think>"),
        ("{% if m.content == 'a' %}A{% else %}{{ m.content }}{% endif %}", "b", "a"),
        ("{% if m.content in ['a', 'b'] %}A{% else %}{{ m.content }}{% endif %}", "c", "b"),
        ("{% if m.content.startswith('/') %}S{% endif %}{{ m.content }}", "a", "/a"),
        ("{% if m.content | trim %}{{ m.content | trim }}{% else %}E{% endif %}", " a ", "  "),
        ("{% set x = '<' ~ m.content.lstrip() ~ '>' %}{{ x }}", " a", None),
        ("{% set x %}<{{ m.content }}>{% endset %}{{ x | trim }}", " a", None),
        ("{% macro f(t) %}<{{ t }}>{% endmacro %}{{ f(m.content) }}", "a", None),
        ("{{ ('a' + m.content).strip() }}", " x ", "  "),
    ],
)
def test_questions_become_conditions(body, holds, fails):
    source = "{% for m in messages %}" + body + "{% endfor %}"
    outline = outline_of(source, ["user"])
    assert outline is not None
    assert outline.holds([holds])
    assert outline.rendered([holds]) == CompiledTemplate(source).render([{"role": "user", "content": holds}], VARIABLES)
    assert fails is None or not outline.holds([fails])


def test_an_outline_does_not_outlive_what_the_clock_said(monkeypatch):
    outline = outline_of("{{ strftime_now('%Y') }}{% for m in messages %}{{ m.content }}{% endfor %}", ["user"])
    assert outline.holds(["a"])

    class Later:
        @staticmethod
        def now():
            import datetime

            return datetime.datetime(2999, 1, 1)

    monkeypatch.setattr("unsloth.data.outline.datetime", Later)
    assert not outline.holds(["a"])
