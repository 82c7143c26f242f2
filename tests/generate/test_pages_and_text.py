"""Pages and their owners; texts as they grow."""

import random

import pytest

from unsloth.generate.pages import PagePool
from unsloth.generate.text import TextStream


def test_chains_are_found_by_their_tokens_only():
    pool = PagePool(10, 2)
    pages = pool.take(3)
    assert pool.remember("a", [1, 2, 3, 4, 5], pages) == 2
    assert pool.find("a", [1, 2, 3, 4, 9, 9]) == pages[:2]
    assert pool.find("a", [1, 2, 9, 4]) == pages[:1]
    assert pool.find("b", [1, 2]) == []
    assert pool.find("a", [3, 4]) == []
    pool.release(pages)
    assert pool.free == 9 and pool.find("a", [1, 2, 3, 4]) == pages[:2]
    pool.forget_all()
    assert pool.free == 9 and pool.find("a", [1, 2]) == []


def test_a_page_is_not_given_away_while_it_is_shared():
    pool = PagePool(4, 2)
    pages = pool.take(2)
    pool.remember("", [1, 2, 3, 4], pages)
    pool.share(pages[:1])
    pool.release(pages)
    taken = pool.take(pool.free)
    assert pages[0] not in taken and pages[1] in taken
    assert pool.find("", [1, 2, 3, 4]) == pages[:1]  # the second holds something else now


def test_the_end_of_the_oldest_chain_is_given_away_first():
    pool = PagePool(5, 1)
    first, second = pool.take(2), pool.take(2)
    pool.remember("", [1, 2], first)
    pool.remember("", [3, 4], second)
    pool.release(first)
    pool.release(second)
    assert pool.take(1) == first[1:]
    assert pool.find("", [1, 2]) == first[:1] and pool.find("", [3, 4]) == second


def test_owners_add_up_whatever_happens():
    rng, pool, held = random.Random(0), PagePool(20, 2), []
    for _ in range(2000):
        if rng.random() < 0.5 and pool.free >= 3:
            tokens = [rng.randrange(2) for _ in range(6)]
            shared = pool.find("", tokens[:-1])
            pool.share(shared)
            pages = shared + (pool.take(3 - len(shared)) if pool.free >= 3 - len(shared) else [])
            if len(pages) == 3:
                pool.remember("", tokens, pages, len(shared))
                held.append(pages)
            else:
                pool.release(pages)
        elif held:
            pool.release(held.pop(rng.randrange(len(held))))
        owned = {page for pages in held for page in pages}
        assert pool.free == 19 - len(owned) and 0 not in owned


@pytest.mark.parametrize("text", ["plain words", "Grüße, 你好 and 👩‍🚀!", "a\n\nb   c"])
def test_pieces_make_the_text(tokenizer, text):
    stream, shown = TextStream(tokenizer), ""
    for token in tokenizer(text)["input_ids"]:
        stream.add(token)
        assert "\ufffd" not in stream.text and stream.text.startswith(shown)
        shown = stream.text
    stream.finish()
    assert stream.text == text


def test_an_incomplete_character_is_shown_in_the_end(tokenizer):
    stream = TextStream(tokenizer)
    for token in tokenizer("a你")["input_ids"][:-1]:
        stream.add(token)
    assert stream.text == "a"
    stream.finish()
    assert stream.text == "a\ufffd"


@pytest.mark.parametrize(("keep", "expected"), [(False, "one "), (True, "one two")])
def test_a_stop_text_is_found_across_tokens_and_never_shown_in_part(tokenizer, keep, expected):
    stream = TextStream(tokenizer, ["xyz", "two"], keep_stop=keep)
    found, shown = [], []
    for token in tokenizer("one two three")["input_ids"]:
        found.append(stream.add(token))
        shown.append(stream.text)
        if found[-1]:
            break
    assert found[-1] == "two" and stream.text == expected
    assert not any(text.endswith(("t", "tw")) for text in shown[:-1])


def test_what_only_began_like_a_stop_text_is_shown_after_all(tokenizer):
    stream = TextStream(tokenizer, ["two"])
    for token in tokenizer("a twin tw")["input_ids"]:
        assert stream.add(token) is None
    assert stream.text == "a twin "
    stream.finish()
    assert stream.text == "a twin tw"
