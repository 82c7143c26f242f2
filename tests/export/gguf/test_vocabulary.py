"""Tokenizers of each kind, trained small, in our words and cut by llama.cpp itself."""

import json

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from unsloth.core.errors import TokenizerError
from unsloth.export.gguf import check, convert, runtime, vocabulary
from unsloth.export.gguf import template as chat

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CORPUS = [
    *check.TEXTS,
    "the quick brown fox jumps over the lazy dog and the other dogs",
    "Der schnelle Fuchs läuft",
] * 3
ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def split(pattern):
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    return pre_tokenizers.Sequence(steps)


LLAMA3 = ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + REST
BYTE_LEVEL = {
    "gpt-2": (pre_tokenizers.ByteLevel(add_prefix_space=False), False),
    "smollm": (pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)]), False),
    "llama-bpe": (split(LLAMA3), True),
    "dbrx": (split(LLAMA3), False),
    "qwen2": (split(ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + REST), False),
    "tekken": (
        split(
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
            r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
            r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        ),
        True,
    ),
    "gpt-4o": (
        split(
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
            r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
            r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        ),
        False,
    ),
}


def byte_level(pre_tokenizer, ignore_merges=False):
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<|im_end|>")


def sentencepiece(like):
    """A tokenizer as transformers makes it from a SentencePiece model of Llama 2's or of Gemma's kind."""
    gemma = like == "gemma"
    steps = [normalizers.Replace(" ", "▁")] if gemma else [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    learned = Tokenizer(models.BPE())
    learned.normalizer = normalizers.Sequence(steps)
    trainer = trainers.BpeTrainer(vocab_size=400, show_progress=False)
    learned.train_from_iterator(CORPUS, trainer)
    content = json.loads(learned.to_str())["model"]
    pieces = sorted(content["vocab"], key=content["vocab"].get)
    names = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    merges = [tuple(merge) for merge in content["merges"]]
    numbered = {name: number for number, name in enumerate(names)}
    model = models.BPE(numbered, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = [("<s>", numbered["<s>"])]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )


def by_llama_cpp(tokenizer, folder, texts, **options):
    config = LlamaConfig(
        vocab_size=len(tokenizer) + 7,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    torch.manual_seed(0)
    convert.plan(LlamaForCausalLM(config), tokenizer, **options).write(folder / "model.gguf")
    return runtime.ask(runtime.Request(folder / "model.gguf", texts=texts))


@pytest.mark.parametrize("name", BYTE_LEVEL)
def test_byte_level_tokenizers_cut_alike(name, tmp_path, engine):
    tokenizer = byte_level(*BYTE_LEVEL[name])
    read = vocabulary.read(tokenizer, len(tokenizer))
    assert read.pre_tokenizer == name
    texts = [*check.TEXTS, "<|im_start|>user\nHi<|im_end|>\n"]
    answer = by_llama_cpp(tokenizer, tmp_path, texts)
    gaps = [text for text in texts if read.is_known_gap(text)]
    assert (len(gaps) > 0) == (len(read.limits) > 0) == (name in ("tekken", "gpt-4o"))
    for text, tokens in zip(texts, answer.tokens, strict=True):
        assert tokens == tokenizer(text).input_ids or text in gaps, text
    assert answer.eos == tokenizer.eos_token_id and tokenizer.eos_token_id in answer.ends


@pytest.mark.parametrize("like", ["llama", "gemma"])
def test_sentencepiece_tokenizers_cut_alike(like, tmp_path, engine):
    tokenizer = sentencepiece(like)
    found = vocabulary.read(tokenizer, len(tokenizer))
    assert found.model == "llama" and found.space_prefix == (like == "llama")
    answer = by_llama_cpp(tokenizer, tmp_path, list(check.TEXTS))
    for text, tokens in zip(check.TEXTS, answer.tokens, strict=True):
        assert tokens == tokenizer(text).input_ids, text
    assert answer.bos == tokenizer.bos_token_id


def test_signs_that_the_tokenizer_composes_are_a_known_gap(tmp_path, engine):
    tokenizer = byte_level(*BYTE_LEVEL["qwen2"])
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    found = vocabulary.read(tokenizer, len(tokenizer))
    assert found.is_known_gap("e\u0301") and not found.is_known_gap("é") and "NFC" in found.limits[0]
    answer = by_llama_cpp(tokenizer, tmp_path, ["e\u0301", "é"])
    assert [answer.tokens[n] == tokenizer(text).input_ids for n, text in enumerate(["e\u0301", "é"])] == [False, True]


def test_an_unknown_way_of_cutting_words_is_an_error_with_a_way_out(tmp_path, engine):
    odd = pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(False)])
    tokenizer = byte_level(odd)
    with pytest.raises(TokenizerError, match=r"Punctuation then gpt2.*pre_tokenizer="):
        by_llama_cpp(tokenizer, tmp_path, [])
    by_llama_cpp(tokenizer, tmp_path, ["a"], pre_tokenizer="gpt-2")


@pytest.mark.parametrize("model", [models.WordLevel({"a": 0, "<unk>": 1}, "<unk>"), models.Unigram([("a", 0.0)])])
def test_other_kinds_are_named(model):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model))
    with pytest.raises(TokenizerError, match=type(model).__name__):
        vocabulary.read(tokenizer, 10)


def test_more_tokens_than_rows_are_refused(tokenizer):
    with pytest.raises(TokenizerError, match=r"259.*200 rows"):
        vocabulary.read(tokenizer, 200)


@pytest.mark.parametrize(
    ("template", "found"),
    [
        ("{% for m in messages %}{{ m.content.split('</think>')[-1].lstrip('\\n') }}{% endfor %}", []),
        ("{{ messages[0].content.split('x', 1)[0] }}{% generation %}x{% endgeneration %}{% break %}", []),
        ("{{ messages[0].content.split('x', maxsplit=1) }}", [".split(maxsplit=...)"]),
        ("{% set a = m['content'].partition('x') %}{{ a[0].removeprefix('b') }}", [".partition()", ".removeprefix()"]),
        ("{% for %}", []),
        (None, []),
    ],
)
def test_what_llama_cpps_templates_lack_is_said(template, found):
    limits = chat.limits(template)
    assert len(limits) == bool(found) and all(name in limits[0] for name in found)
