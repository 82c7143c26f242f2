"""Multiple-choice questions, asked after a few answered examples: MMLU (Hendrycks et al., 2021, arXiv:2009.03300).

The prompt is that of the original benchmark. The answer is the letter with the largest probability at the next token,
where a letter's probability is that of all its tokens: many vocabularies have one for "A" and one for " A", and a
model may put its belief on either.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from unsloth.core.errors import DataError, TokenizerError
from unsloth.data import sources
from unsloth.export.predict import Predictor

LETTERS = "ABCD"
_SPACES = ("Ġ", "▁", " ")  # how vocabularies write a space


@dataclass(frozen=True)
class Question:
    """One question: its subject, text, four choices, and which of them is right (0 to 3)."""

    subject: str
    text: str
    choices: tuple[str, ...]
    answer: int

    def shown(self, answered: bool) -> str:
        """The question as it stands in the prompt."""
        lines = [self.text, *(f"{letter}. {choice}" for letter, choice in zip(LETTERS, self.choices, strict=True))]
        return "\n".join(lines) + "\nAnswer:" + (f" {LETTERS[self.answer]}\n\n" if answered else "")


@dataclass(frozen=True)
class Score:
    """How many questions were answered right.

    Attributes:
        questions: How many were asked.
        accuracy: Share answered right, both kinds of letters counted.
        error: Standard error of that share.
        spaced: Share if only letters after a space count.
        unspaced: Share if only letters without one count.
        by_subject: Accuracy of each subject.
    """

    questions: int
    accuracy: float
    error: float
    spaced: float
    unspaced: float
    by_subject: Mapping[str, float]


def read(data: str | os.PathLike[str]) -> list[Question]:
    """Questions of a file: columns ``question``, ``choices`` (or ``A`` to ``D``), ``answer``, and ``subject``.

    Raises:
        DataError: Names the row that cannot be used.
    """
    return [_question(row, number) for number, row in enumerate(sources.load_rows(data))]


def score(
    predictor: Predictor,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    examples: Sequence[Question],
    shots: int = 5,
) -> Score:
    """Ask questions, each after examples of its subject.

    Args:
        predictor: The model.
        tokenizer: Its tokenizer.
        questions: To be asked.
        examples: With their answers; the first ``shots`` of each subject are shown.
        shots: Examples before each question.

    Raises:
        DataError: No question, or too few examples of a subject.
        TokenizerError: The vocabulary has no token for a letter.
    """
    if not questions:
        raise DataError("no questions to ask")
    spaced, unspaced = letter_tokens(tokenizer)
    shown = _examples(questions, examples, shots)
    prompts = [tokenizer(text=prompt(question, shown[question.subject]))["input_ids"] for question in questions]
    right: dict[str, list[bool]] = defaultdict(list)
    counts = {"both": 0, "spaced": 0, "unspaced": 0}
    for question, logits in zip(questions, predictor.logits(prompts), strict=True):
        probabilities = logits[-1].double().softmax(-1)
        given = {
            "both": _best(probabilities, [[*a, *b] for a, b in zip(spaced, unspaced, strict=True)]),
            "spaced": _best(probabilities, spaced),
            "unspaced": _best(probabilities, unspaced),
        }
        for kind, answer in given.items():
            counts[kind] += answer == question.answer
        right[question.subject].append(given["both"] == question.answer)
    number = len(questions)
    accuracy = counts["both"] / number
    return Score(
        questions=number,
        accuracy=accuracy,
        error=math.sqrt(accuracy * (1 - accuracy) / number),
        spaced=counts["spaced"] / number,
        unspaced=counts["unspaced"] / number,
        by_subject={subject: sum(found) / len(found) for subject, found in sorted(right.items())},
    )


def prompt(question: Question, examples: Sequence[Question]) -> str:
    """The text after which the next token is the answer."""
    subject = question.subject.replace("_", " ")
    head = f"The following are multiple choice questions (with answers) about {subject}.\n\n" if subject else ""
    return head + "".join(example.shown(answered=True) for example in examples) + question.shown(answered=False)


def letter_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[list[int]], list[list[int]]]:
    """Ids of each letter's tokens, after a space and without one.

    Raises:
        TokenizerError: A letter has no token.
    """
    vocabulary = tokenizer.get_vocab()
    spaced = [[vocabulary[s + letter] for s in _SPACES if s + letter in vocabulary] for letter in LETTERS]
    unspaced = [[vocabulary[letter]] if letter in vocabulary else [] for letter in LETTERS]
    if not all(a or b for a, b in zip(spaced, unspaced, strict=True)):
        raise TokenizerError("the vocabulary has no token for a letter from A to D", got=type(tokenizer).__name__)
    return spaced, unspaced


def _best(probabilities: torch.Tensor, ids: Sequence[Sequence[int]]) -> int:
    """The letter with most probability; -1 if none has a token of this kind."""
    sums = [probabilities[list(of_letter)].sum().item() if of_letter else -1.0 for of_letter in ids]
    return max(range(len(sums)), key=sums.__getitem__) if max(sums) >= 0 else -1


def _examples(
    questions: Sequence[Question], examples: Sequence[Question], shots: int
) -> Mapping[str, Sequence[Question]]:
    found: dict[str, list[Question]] = defaultdict(list)
    for example in examples:
        if len(found[example.subject]) < shots:
            found[example.subject].append(example)
    for subject in {question.subject for question in questions}:
        if len(found[subject]) < shots:
            raise DataError(
                f"the subject '{subject}' has {len(found[subject])} examples, and {shots} are to be shown",
                do="Give a file with more, or fewer --shots.",
            )
    return found


def _question(row: Mapping[str, Any], number: int) -> Question:
    try:
        choices = row["choices"] if "choices" in row else [row[letter] for letter in LETTERS]
        answer = row["answer"]
        text = str(row["question"])
    except KeyError as error:
        raise DataError(
            f"row {number} has no {error}",
            got=list(row),
            do="A row has question, choices (or A, B, C, D), answer, and may have a subject.",
        ) from None
    letter = str(answer).strip()
    right = LETTERS.find(letter) if len(letter) == 1 and letter in LETTERS else int(letter) if letter.isdigit() else -1
    if len(choices) != len(LETTERS) or not 0 <= right < len(LETTERS):
        raise DataError(f"row {number} has {len(choices)} choices and the answer {answer!r}", do="Four are expected.")
    return Question(str(row.get("subject") or ""), text, tuple(map(str, choices)), right)
