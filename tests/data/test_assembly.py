"""Rows that are put together against rows that are rendered and tokenized whole, token by token and label by label."""

from __future__ import annotations

import copy
import random
from pathlib import Path

import pytest
import trl
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import unsloth.data.templates as own
from unsloth.data import encode, formats
from unsloth.data.encode import Encoder, Filled, PrepareOptions

OWN = sorted(Path(own.__file__).parent.glob("*.jinja"))
FOREIGN = [
    Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja"
    for name in ("llama3", "qwen2_5_training", "qwen3_training", "phi3", "deepseekv3", "gemma3_training", "lfm2")
]
CHATML = next(file for file in OWN if file.stem == "chatml")
TEXTS = [
    *(
        "hi there",
        " a ",
        "\n",
        "\n\nthe end\n\n",
        "  ",
        "ü漢😀",
        "{0} %s",
        "</think>",
        "<think>\n\n</think>\n\nb",
        "",
        "",
    ),
    *("<|im_end|>", "\u0301e", "\n\u0301", "assistant", "12 345", "\t\tx", "a\r\nb", "the the the", "<", "im_end|>"),
]
CORPUS = [
    "the end of the story\n\nand the start of the next\n",
    "assistant user system 12 345 the the\n\n\n",
    "a b\t\tc ",
]


@pytest.fixture(scope="module")
def bpe() -> PreTrainedTokenizerFast:
    """A byte-level BPE with merges over line breaks and spaces, as those of large models have, and control tokens."""
    tokenizer = Tokenizer(models.BPE())
    pattern = r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+| ?\p{L}+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(CORPUS * 50, trainer)
    special = ["<|im_start|>", "<|im_end|>", "<|eot_id|>", "<s>", "</s>", "<think>", "<|end|>", "<start_of_turn>"]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="<|im_end|>",
        pad_token="</s>",
        additional_special_tokens=special,
    )


def rows_of(count, seed=0):
    draw = random.Random(seed)
    shapes = [["user", "assistant"], ["system", "user", "assistant"], ["user", "assistant", "user", "assistant"]]
    return [
        {"messages": [{"role": role, "content": draw.choice(TEXTS)} for role in draw.choice(shapes)]}
        for _ in range(count)
    ]


def encoded(tokenizer, rows, **options):
    encoder = Encoder(tokenizer, formats.detect(list(rows[0])), PrepareOptions(max_length=None, **options))
    pieces = encoder.pieces(rows, range(len(rows)))
    made = sum(isinstance(piece, Filled) for piece in pieces)
    return encoder.encode(rows, range(len(rows))), made


@pytest.mark.parametrize(
    ("file", "train_on"),
    [(file, "responses") for file in [*OWN, *FOREIGN]]
    + [(file, way) for file in OWN for way in ("all", "last_response") if file.stem in ("chatml", "llama-3", "qwen-3")],
    ids=lambda value: value if isinstance(value, str) else f"{value.parent.name}-{value.stem}",
)
def test_assembled_rows_equal_rendered_rows(file, train_on, bpe):
    tokenizer = copy.deepcopy(bpe)
    tokenizer.chat_template = file.read_text(encoding="utf-8")
    rows = rows_of(40, seed=len(file.stem))
    if "system" not in tokenizer.chat_template or file.stem in ("gemma",):
        rows = [row for row in rows if row["messages"][0]["role"] != "system"]
    expected, none = encoded(tokenizer, rows, train_on=train_on, outlines=False)
    got, made = encoded(tokenizer, rows, train_on=train_on)
    assert none == 0
    assert got == expected
    assert made > 5


def test_weights_completions_and_variables_too(bpe):
    tokenizer = copy.deepcopy(bpe)
    tokenizer.chat_template = CHATML.read_text(encoding="utf-8")
    talk = [("user", "a", {}), ("assistant", "b", {"weight": 0}), ("user", "c", {}), ("assistant", " d", {"weight": 1})]
    rows = [
        {"messages": [{"role": role, "content": f"{text} {n}", **more} for role, text, more in talk]} for n in range(9)
    ]
    for row in rows[::2]:
        row["reasoning_effort"] = "high"
    expected, _ = encoded(tokenizer, rows, train_on="responses", outlines=False)
    got, made = encoded(tokenizer, rows, train_on="responses")
    assert got == expected
    assert made == 9 - 2 * (encode_after() - 1)
    pairs = [
        {
            "prompt": [{"role": "user", "content": f"q {n}"}, {"role": "assistant", "content": "x"}],
            "completion": [{"role": "user", "content": "more"}, {"role": "assistant", "content": f"\n{n}"}],
        }
        for n in range(9)
    ]
    assert encoded(tokenizer, pairs)[0] == encoded(tokenizer, pairs, outlines=False)[0]


def encode_after():
    from unsloth.data import forms

    return forms._WORTHWHILE


@pytest.mark.parametrize("name", ["\n\n", "xuser\n", "  "])
def test_an_added_token_that_may_straddle_a_message_is_seen(name, bpe):
    """A text may begin or end with one half of it, and the template bring the other half."""
    tokenizer = copy.deepcopy(bpe)
    tokenizer.chat_template = CHATML.read_text(encoding="utf-8").replace("<|im_start|>", "x")
    tokenizer.add_tokens([name], special_tokens=True)
    rows = rows_of(120, seed=3)
    rows += [{"messages": [{"role": "user", "content": text} for text in ("\n a x", "b \n")]} for _ in range(9)]
    assert encoded(tokenizer, rows)[0] == encoded(tokenizer, rows, outlines=False)[0]


def test_a_tokenizer_that_looks_beyond_a_stretch_is_asked_for_the_whole(bpe):
    tokenizer = copy.deepcopy(bpe)
    tokenizer.chat_template = CHATML.read_text(encoding="utf-8")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    rows = rows_of(60)
    got, made = encoded(tokenizer, rows, train_on="responses")
    assert made == 0
    assert got == encoded(tokenizer, rows, train_on="responses", outlines=False)[0]


def test_a_tokenizer_with_truncation_left_on_gives_whole_rows(bpe):
    tokenizer = copy.deepcopy(bpe)
    tokenizer.chat_template = CHATML.read_text(encoding="utf-8")
    rows = rows_of(30)
    expected = encoded(tokenizer, rows)[0]
    tokenizer(["a"], truncation=True, max_length=2, padding="max_length")
    assert encoded(tokenizer, rows)[0] == expected
    assert encode.TRUNCATED not in expected["flags"]


@pytest.mark.model
def test_with_the_tokenizer_of_a_real_model(smollm2):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    rows = rows_of(300, seed=5)
    for train_on in ("all", "responses", "last_response"):
        got, made = encoded(tokenizer, rows, train_on=train_on)
        assert made > 100
        assert got == encoded(tokenizer, rows, train_on=train_on, outlines=False)[0]
