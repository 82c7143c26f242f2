"""Calls of tools are read from what models write, and nothing else is taken for one."""

import json

import pytest

from unsloth.data import tool_calls

CALL = '{"name": "weather", "arguments": {"city": "Oslo"}}'
LLAMA = '{"name": "weather", "parameters": {"city": "Oslo"}}'


@pytest.mark.parametrize(
    ("text", "rest", "count"),
    [
        (f"<tool_call>\n{CALL}\n</tool_call>", "", 1),
        (f"Let me see.\n<tool_call>{CALL}</tool_call>\n<tool_call>\n{CALL}</tool_call>", "Let me see.", 2),
        (f"<tool_call>{CALL}", "", 1),
        (f"[TOOL_CALLS][{CALL}, {CALL}]", "", 2),
        (f"[{CALL}]", "", 1),
        (LLAMA, "", 1),
        (f"<|python_tag|>{LLAMA}", "", 1),
        ("<tool_call>{broken</tool_call> text", "<tool_call>{broken</tool_call> text", 0),
        ('{"city": "Oslo"}', '{"city": "Oslo"}', 0),
        (f'[{CALL}, {{"x": 1}}]', f'[{CALL}, {{"x": 1}}]', 0),
        ("  plain text ", "  plain text ", 0),
        ("", "", 0),
    ],
)
def test_calls(text, rest, count):
    found, calls = tool_calls.split(text)
    assert (found, len(calls)) == (rest, count)
    assert all(call.name == "weather" and json.loads(call.arguments) == {"city": "Oslo"} for call in calls)
    assert len({call.id for call in calls}) == count


@pytest.mark.parametrize(
    "text", ["plain text", f"Well.<tool_call>{CALL}</tool_call>", CALL, f"[TOOL_CALLS][{CALL}]", "a < b <tool", " {x"]
)
def test_what_is_sent_early_is_never_taken_back(text):
    final, _ = tool_calls.split(text)
    for end in range(len(text) + 1):
        early = text[: tool_calls.settled(text[:end])]
        assert final.startswith(early) or early.strip() == final
