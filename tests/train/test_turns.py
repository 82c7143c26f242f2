"""Completions of several turns: tokens, masks and ends, with a scripted model in place of a real one."""

import random

import pytest

from unsloth.core.errors import ConfigError
from unsloth.train.turns import Episode, Limits, Turns, play, text_between

END = 9


def episodes(*turns, logprobs=True):
    return [
        Episode(
            [1, 2],
            list(ids),
            [1] * len(ids),
            [-0.5] * len(ids) if logprobs else None,
            [{"content": ids}],
            ids[-1:] == [END],
        )
        for ids in turns
    ]


def run(found, limits, replies, turns, between=(7, 7, 7)):
    """``replies`` by episode and turn; ``turns`` by episode, one after another."""
    asked, seen = [], []

    def reply(numbers):
        asked.append(list(numbers))
        return [replies[number][found[number].turns - 1] for number in numbers]

    def sample(prompts, most):
        seen.append(prompts)
        ids = [turns[number].pop(0) for number in range(len(found)) if found[number].end is None]
        logprobs = None if found[0].logprobs is None else [[-1.0] * len(turn) for turn in ids]
        return Turns(ids, logprobs, [turn[-1] == END for turn in ids])

    play(found, limits, reply, lambda *_: list(between), sample, lambda _, ids: {"content": ids})
    return asked, seen


def test_each_token_belongs_to_whoever_wrote_it():
    found = episodes([5, END], [6, 6, END], [4, END])
    say = [{"content": "tool"}]
    replies = [[say, say, "answered"], ["answered"], [say, "over"]]
    turns = [[[3, END], [8, 8, END]], [], [[2, END]]]
    asked, seen = run(found, Limits(100, 200, None, frozenset({END})), replies, turns)
    assert found[0].ids == [5, END, 7, 7, 7, 3, END, 7, 7, 7, 8, 8, END]
    assert found[0].mask == [1, 1, 0, 0, 0, 1, 1, 0, 0, 0, 1, 1, 1]
    assert found[0].logprobs == [-0.5] * 2 + [0.0] * 3 + [-1.0] * 2 + [0.0] * 3 + [-1.0] * 3
    assert [episode.end for episode in found] == ["answered", "answered", "over"]
    assert [episode.turns for episode in found] == [3, 1, 2]
    assert found[2].ids == [4, END, 7, 7, 7, 2, END] and not any(episode.cut for episode in found)
    assert asked == [[0, 1, 2], [0, 2], [0]]  # one batch a turn
    assert seen[0] == [[1, 2, 5, END, 7, 7, 7], [1, 2, 4, END, 7, 7, 7]]


def test_a_turn_that_a_stop_text_ended_is_answered():
    found = episodes([5, 6])
    found[0].finished = True
    run(found, Limits(6, 200, None, frozenset({END})), [[[{"content": "go on"}], "over"]], [[[3, END]]])
    assert found[0].end == "too long"  # an answer and a turn do not fit
    found = episodes([5, 6])
    found[0].finished = True
    run(found, Limits(2, 200, None, frozenset({END})), [["over"]], [[]])
    assert found[0].end == "over" and not found[0].cut


def test_an_endless_game_is_cut_by_turns():
    found = episodes([5, END])
    say = [{"content": "again"}]
    run(found, Limits(1000, 1000, 4, frozenset({END})), [[say] * 9], [[[3, END]] * 9])
    assert found[0].turns == 4 and found[0].end == "too many turns" and found[0].cut
    assert found[0].ids[-1] == END and found[0].mask[-1] == 1  # what was not answered is not there


@pytest.mark.parametrize("seed", range(20))
def test_no_completion_is_longer_than_allowed(seed):
    choose = random.Random(seed)
    limits = Limits(choose.randint(3, 40), choose.randint(10, 45), None, frozenset({END}))
    first = [[3] * choose.randint(0, 5) + [END] for _ in range(4)]
    first = [turn[: min(limits.tokens, limits.sequence - 2)] for turn in first]
    found = episodes(*first, logprobs=bool(seed % 2))
    turns = [[[4] * choose.randint(0, 12) + [END] for _ in range(50)] for _ in found]
    run(found, limits, [[[{"content": "more"}]] * 50] * 4, turns, [7] * choose.randint(1, 6))
    for episode in found:
        assert len(episode.ids) <= limits.tokens and 2 + len(episode.ids) <= limits.sequence
        assert len(episode.ids) == len(episode.mask) and episode.end == "too long"
        assert episode.logprobs is None or len(episode.logprobs) == len(episode.ids)


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("role", ["user", "tool"])
def test_what_a_template_puts_between_two_turns(tokenizer, role):
    def render(messages):
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, chat_template=CHATML)

    message = {"role": role, "name": "look", "content": " 1 2\n3 4"}
    text = text_between(render, [message], ["<|im_end|>", "<|endoftext|>"])
    assert text == f"<|im_end|>\n<|im_start|>{role}\n 1 2\n3 4<|im_end|>\n<|im_start|>assistant\n"
    with pytest.raises(ConfigError, match="does not show what an environment answers"):
        text_between(lambda messages: render([m for m in messages if m is not message]), [message], ["<|im_end|>"])
