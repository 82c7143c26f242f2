import json

import pytest
import torch

from unsloth.core.errors import DataError, TokenizerError
from unsloth.export import mmlu
from unsloth.export.mmlu import Question


def question(number, answer=0, subject="high_school_physics"):
    return Question(subject, f"Question {number}?", ("one", "two", "three", "four"), answer)


class Vocabulary:
    """A tokenizer of letters with and without a space, and characters for the rest."""

    ids = {"A": 1, "B": 2, "C": 3, "D": 4, "ĠA": 11, "ĠB": 12, "ĠC": 13, "ĠD": 14}

    def get_vocab(self):
        return self.ids

    def __call__(self, text):
        return {"input_ids": list(text.encode())}


class Answers:
    """Gives each prompt the probabilities of tokens that are listed for it."""

    def __init__(self, answers):
        self.answers, self.prompts = answers, []

    def logits(self, sequences):
        for ids, given in zip(sequences, self.answers, strict=True):
            self.prompts.append(bytes(ids).decode())
            probabilities = torch.full((20,), 1e-6)
            for token, value in given.items():
                probabilities[token] = value
            yield torch.stack([torch.zeros(20), probabilities.log()])


def test_letters_count_with_and_without_a_space():
    answers = [{11: 0.3, 2: 0.35, 1: 0.1}, {12: 0.4, 13: 0.35, 3: 0.3}, {14: 0.9, 2: 0.05}]
    predictor = Answers(answers)
    asked = [question(1, 0), question(2, 2), question(3, 0)]
    found = mmlu.score(predictor, Vocabulary(), asked, [], shots=0)
    assert (found.accuracy, found.spaced, found.unspaced) == pytest.approx((2 / 3, 1 / 3, 1 / 3))
    assert found.questions == 3 and found.error == pytest.approx((2 / 9 / 3) ** 0.5)


def test_the_prompt_is_that_of_the_benchmark():
    predictor = Answers([{1: 1.0}])
    examples = [question(7, 1), question(8, 3), question(9, 0), question(0, subject="law")]
    mmlu.score(predictor, Vocabulary(), [question(1)], examples, shots=2)
    assert predictor.prompts == [
        "The following are multiple choice questions (with answers) about high school physics.\n\n"
        "Question 7?\nA. one\nB. two\nC. three\nD. four\nAnswer: B\n\n"
        "Question 8?\nA. one\nB. two\nC. three\nD. four\nAnswer: D\n\n"
        "Question 1?\nA. one\nB. two\nC. three\nD. four\nAnswer:"
    ]


def test_rows_of_either_layout_are_read(tmp_path):
    rows = [
        {"question": "q", "choices": ["1", "2", "3", "4"], "answer": 2, "subject": "law"},
        {"question": "q", "A": "1", "B": "2", "C": "3", "D": "4", "answer": "C", "subject": "law"},
    ]
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = mmlu.read(path)
    assert first == second == Question("law", "q", ("1", "2", "3", "4"), 2)
    (tmp_path / "q.csv").write_text("question,A,B,C,D,answer\nq,1,2,3,4,B\n")
    assert mmlu.read(tmp_path / "q.csv")[0].answer == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q", "answer": 1}, "row 0 has no 'A'"),
        ({"question": "q", "choices": ["1", "2"], "answer": 1}, "2 choices"),
        ({"question": "q", "choices": list("1234"), "answer": "E"}, "answer 'E'"),
    ],
)
def test_rows_that_cannot_be_used_are_named(tmp_path, row, message):
    (tmp_path / "q.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=message):
        mmlu.read(tmp_path / "q.jsonl")


def test_what_cannot_be_asked():
    with pytest.raises(DataError, match="no questions"):
        mmlu.score(Answers([]), Vocabulary(), [], [])
    with pytest.raises(DataError, match="high_school_physics.*1 examples, and 5"):
        mmlu.score(Answers([]), Vocabulary(), [question(1)], [question(2)])
    empty = Vocabulary()
    empty.ids = {"A": 1}
    with pytest.raises(TokenizerError, match="letter"):
        mmlu.letter_tokens(empty)
