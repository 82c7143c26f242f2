import math
from fractions import Fraction

import pytest

from unsloth.core.errors import ConfigError, RewardError
from unsloth.rewards import (
    LANGUAGES,
    contains,
    correctness,
    detect_language,
    exact_match,
    final_answer,
    gibberish,
    integer,
    keyword,
    language,
    length,
    no_globals,
    number_detected,
    parse_number,
    proximity,
    signature,
    soft_format,
    standard_imports_only,
    strict_format,
    text_of,
    xml_count,
)


def score(reward, text, **columns):
    """As trainers call it, once with text and once with messages; both must agree."""
    columns = {name: [value] for name, value in columns.items()}
    plain = reward(prompts=["p"], completions=[text], **columns)
    chat = reward(
        prompts=[[{"role": "user", "content": "p"}]],
        completions=[[{"role": "assistant", "content": text}]],
        **columns,
    )
    assert plain == chat and len(plain) == 1
    return plain[0]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("4", 4), ("-4.50", Fraction(-9, 2)), ("1,234,567.5", Fraction(2469135, 2)), ("3/4", Fraction(3, 4)),
        ("$1,200.", 1200),
        ("50%", 50), ("1e3", 1000), ("+7", 7), (".5", Fraction(1, 2)), ("(42)", 42), ("007", 7),
        ("", None), ("four", None), ("4 apples", None), ("1,23", None), ("1/0", None), ("e5", None), ("--4", None),
        ("1.2.3", None), ("1e99999999", None), ("9" * 100, None), ("٣", None), ("-", None), (".", None),
    ],
)  # fmt: skip
def test_numbers_are_read_exactly(text, number):
    assert parse_number(text) == number


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<reasoning>2</reasoning>\n<answer>\n4\n</answer>", "4"),
        ("<answer>1</answer> no, <answer>4", "4"),
        (r"so \boxed{\frac{1}{2}} it is", r"\frac{1}{2}"),
        (r"\boxed{1} then \boxed{4}", "4"),
        ("steps\n#### 4", "4"),
        ("<think>#### 5</think>4", "4"),
        ("4", "4"),
    ],
)
def test_the_final_answer(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "answer", "reward"),
    [
        ("<answer>4</answer>", "4", 2.0),
        ("<answer>4.0</answer>", 4, 2.0),
        ("<answer>1,000</answer>", "1000", 2.0),
        ("<answer> New  york </answer>", "New York", 2.0),
        ("<answer>5</answer>", "4", 0.0),
        ("The answer is 4, or 5.", "4", 0.0),
        ("<answer>4 5</answer>", "4", 0.0),
        ("", "4", 0.0),
    ],
)
def test_correctness(text, answer, reward):
    assert score(correctness(), text, answer=answer) == reward


def test_correctness_with_another_column_and_extraction():
    reward = correctness("target", reward=3.0, otherwise=-3.0, extract=str.upper)
    assert score(reward, "yes", target="YES") == 3.0 and score(reward, "no", target="YES") == -3.0


@pytest.mark.parametrize(
    ("text", "reward"), [("<answer>12</answer>", 0.5), ("12.0", 0.5), ("1.5", 0.0), ("twelve", 0.0)]
)
def test_integer(text, reward):
    assert score(integer(), text) == reward


@pytest.mark.parametrize(("text", "reward"), [("It is 4.", 1.0), ("It is four.", -1.0), ("x2y", -1.0), ("-3,5", 1.0)])
def test_number_detected(text, reward):
    assert score(number_detected(), text) == reward


def test_proximity_pays_more_the_closer():
    reward = proximity()
    exact, near, far, outlier = (score(reward, text, answer="10") for text in ("10", "9", "6", "3"))
    assert exact == 3.0 and exact > near > far > 0 > outlier == -1.5
    assert near == pytest.approx(2.0 * (1 - 0.1 / 0.5)) and far == pytest.approx(2.0 * (1 - 0.4 / 0.5))
    assert score(reward, "no idea", answer="10") == -2.0
    assert score(reward, "<answer>about 9 dollars</answer>", answer="10") == near
    assert score(reward, "1e300", answer="10") == -1.5
    assert score(reward, "0.1", answer="0") == pytest.approx(2.0 * (1 - 0.1 / 0.5))
    with pytest.raises(ConfigError, match="not a number"):
        score(reward, "1", answer="ten")
    with pytest.raises(ConfigError, match="tolerance"):
        proximity(tolerance=0)


GOOD = "<reasoning>\nIt is even.\n</reasoning>\n<answer>\n4\n</answer>\n"


@pytest.mark.parametrize(
    ("text", "soft", "strict"),
    [
        (GOOD, 0.5, 0.5),
        (GOOD.rstrip(), 0.5, 0.5),
        (GOOD.replace("\n", ""), 0.5, 0.0),
        (f"  {GOOD}  ", 0.5, 0.0),
        (GOOD.replace("</reasoning>\n", "</reasoning>\n\n"), 0.5, 0.0),
        ("Sure! " + GOOD, 0.0, 0.0),
        (GOOD + "Bye.", 0.0, 0.0),
        (GOOD + GOOD, 0.0, 0.0),
        (GOOD.replace("4", ""), 0.0, 0.0),
        (GOOD.replace("4", "<answer>4"), 0.0, 0.0),
        ("<answer>4</answer><reasoning>r</reasoning>", 0.0, 0.0),
        ("<reasoning>r</reasoning>", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_formats(text, soft, strict):
    assert (score(soft_format(), text), score(strict_format(), text)) == (soft, strict)


def test_other_tags():
    tags = ["start_working_out", "solution"]
    assert score(soft_format(tags), "<start_working_out>a</start_working_out><solution>b</solution>") == 0.5
    for wrong in ("answer", [], ["a b"], ["<a>"]):
        with pytest.raises(ConfigError, match="tags"):
            soft_format(wrong)


def test_xml_count():
    assert score(xml_count(), GOOD) == 0.5
    assert score(xml_count(), GOOD + "12345") == pytest.approx(0.495)
    assert score(xml_count(), GOOD.replace("<answer>", "")) == pytest.approx(0.375)
    assert score(xml_count(), GOOD.replace("<answer>", "<answer><answer>")) == pytest.approx(0.375)
    assert score(xml_count(), "nothing") == 0.0
    assert score(xml_count(), GOOD + "x" * 10**5) == -0.5


def test_keyword():
    assert score(keyword("refund"), "A Refund, please") == 1.0
    assert score(keyword("fund"), "A Refund, please") == 0.0
    assert score(keyword("Refund", case_sensitive=True), "a refund") == 0.0
    assert score(keyword(["a", "b"], match="all"), "a c") == 0.0 and score(keyword(["a", "b"]), "a c") == 1.0
    assert score(keyword("C++"), "I like C++.") == 1.0
    with pytest.raises(ConfigError, match="needs words"):
        keyword([])


def test_contains_and_exact_match():
    assert score(contains("recipient"), "Dear ada, ...", recipient="Ada") == 1.0
    assert score(contains("recipient"), "Dear Bob, ...", recipient="Ada") == 0.0
    assert score(contains("recipient"), "anything", recipient="") == 0.0
    assert score(exact_match("ideal"), " Hello\n", ideal="Hello") == 1.0
    assert score(exact_match("ideal"), "hello", ideal="Hello") == 0.0


def test_length():
    assert score(length(maximum=5), "12345") == 0.0 and score(length(maximum=5), "123456") == -1.0
    words = length(minimum=2, maximum=3, unit="words", reward=1.0)
    assert [score(words, text) for text in ("a", "a b", "a b c d")] == [-1.0, 1.0, -1.0]
    for arguments in ({"maximum": -1}, {"minimum": 5, "maximum": 4}, {"maximum": 3, "unit": "tokens"}):
        with pytest.raises(ConfigError):
            length(**arguments)


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("Dear Bob,\nyes.\n\nBest regards\nAda\nada@example.com", 1.0),
        ("Yes.\n--\nAda, +49 (0)30 1234567", 1.0),
        ("Yes.\nAda\n12 Long Wood Street\nLeeds", 1.0),
        ("Ja.\nAda\nBergstraße 5\nBerlin", 1.0),
        ("Write to ada@example.com." + "\nline" * 10, 0.0),
        ("In 2024 we sold 12345 units.", 0.0),
        ("", 0.0),
    ],
)
def test_signature(text, reward):
    assert score(signature(), text) == reward


SENTENCES = {
    "en": "The cat is not in the house, and they have not seen it for a week.",
    "de": "Die Katze ist nicht im Haus, und sie haben sie auch nicht auf der Straße gesehen.",
    "fr": "Le chat est dans la maison et nous ne sommes pas sur la route avec vous.",
    "es": "El gato está en la casa, pero los perros no se ven y son muy grandes.",
    "it": "Il gatto non è nella casa, ma anche questo si vede e sono più belli con gli altri.",
    "pt": "O gato não está em casa, mas os cães são muito grandes e também se veem na rua.",
    "nl": "De kat is niet in het huis, maar ook deze hond en die van hem zijn er voor de dag.",
    "sv": "Katten är inte i huset och det som vi har är att den kan ha gått till en av de andra.",
    "pl": "Kot nie jest w domu i to się już nie zmieni, ale tak jak my jest on na ulicy po deszczu.",
    "id": "Kucing itu tidak ada di rumah dan saya juga tidak bisa mencari dengan kamu untuk hari ini.",
    "ja": "猫は家にいません。学生です。",
    "ko": "고양이는 집에 없습니다.",
    "zh": "猫不在家里。",
    "ar": "القطة ليست في البيت.",
    "he": "החתול לא בבית.",
    "el": "Η γάτα δεν είναι στο σπίτι.",
    "ru": "Кошки нет дома.",
    "hi": "बिल्ली घर में नहीं है।",
    "th": "แมวไม่อยู่บ้าน",
}


def test_every_language_that_is_offered_is_told_apart():
    assert set(SENTENCES) == set(LANGUAGES)
    assert {code: detect_language(text) for code, text in SENTENCES.items()} == {code: code for code in SENTENCES}


@pytest.mark.parametrize(
    "text", ["", "42 + 17 = 59", "hello there", "return foo(bar, y=3) + y * y; y", "zzz qqq xxx www vvv"]
)
def test_what_says_too_little_is_unknown(text):
    assert detect_language(text) is None


def test_language():
    reward = language("id")
    assert [score(reward, text) for text in (SENTENCES["id"], SENTENCES["en"], "42")] == [1.0, -1.0, 0.0]
    with pytest.raises(ConfigError, match="cannot be detected"):
        language("tlh")


@pytest.mark.parametrize(
    ("text", "penalty"),
    [
        ("A plain sentence.\n\nAnd another one.", 0.0),
        ("addCriterion" * 5 + "some text", -2.0),
        ("a\n\n\n\n\nb", -2.0),
        ("the " * 8, -2.0),
        ("very very good " * 2, 0.0),
        ("I am here " * 8, -2.0),
        ("\x00\x01" * 30, -2.0),
        ("ไทยภาษาไทย" * 3 + "हिन्दी भाषा में लिखा हुआ वाक्य", 0.0),
        ("", 0.0),
    ],
)
def test_gibberish(text, penalty):
    assert score(gibberish(), text) == penalty


def test_code_filters():
    def fenced(code):
        return f"Here:\n```python\n{code}\n```\nDone."

    clean, numpy, table = "def f(x):\n    return x", "def f(x):\n    import numpy", "T = {}\ndef f(x):\n    return T"
    assert [score(standard_imports_only(), fenced(code)) for code in (clean, numpy, table)] == [1.0, -20.0, 1.0]
    assert [score(no_globals(), fenced(code)) for code in (clean, numpy, table)] == [1.0, -20.0, -20.0]
    assert score(no_globals(), "no code") == -1.0 and score(standard_imports_only(), "no code") == -1.0


def test_text_of_completions():
    assert text_of([{"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}]) == "a"
    assert text_of([{"role": "assistant", "content": None}]) == ""
    assert text_of([{"content": "first"}, {"content": "last"}]) == "last"
    for wrong in (None, 3, [], [1], {"content": "x"}):
        with pytest.raises(RewardError, match="neither text nor a list of messages"):
            text_of(wrong)


def test_a_missing_column_is_named():
    with pytest.raises(RewardError, match=r"'correctness' needs the column 'answer': got \['solution'\]"):
        correctness()(prompts=["p"], completions=["c"], solution=["s"])
    with pytest.raises(RewardError, match="2 values for 1 completions"):
        correctness()(prompts=["p"], completions=["c"], answer=["a", "b"])


def test_rewards_carry_their_names():
    assert [reward.__name__ for reward in (correctness(), soft_format(), xml_count())] == [
        "correctness", "soft_format", "xml_count",
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["<reasoning>" * 20000, "1," * 50000, "a@" * 50000, "score " * 20000, "{" * 10**5])
def test_long_texts_take_linear_time(text):
    rewards = [soft_format(), strict_format(), xml_count(), number_detected(), integer(), signature(), keyword("b")]
    assert all(math.isfinite(score(reward, text)) for reward in rewards)
    assert math.isfinite(score(correctness(), "\\boxed{" + text, answer="1"))
