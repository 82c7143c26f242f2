"""Every family with a spec, written by us and run by llama.cpp itself."""

import pytest
import torch

from unsloth.core.errors import ExportError
from unsloth.export import verify
from unsloth.export.gguf import architectures, convert, runtime
from unsloth.models import families

from .conftest import FAMILIES, logits

RUN = [name for name in FAMILIES if name not in ("cohere, head norms", "vaultgemma")]
# llama.cpp has a table of half precision for Gemma's activation; elsewhere only the order of sums differs.
TABLE = ("gemma", "gemma2", "gemma3")


def by_llama_cpp(model, tokenizer, ids, folder, **options):
    conversion = convert.plan(model, tokenizer, "f32", **options)
    conversion.write(folder / "model.gguf")
    return torch.cat(runtime.ask(runtime.Request(folder / "model.gguf", ids=ids)).logits)


@pytest.mark.parametrize("name", RUN)
def test_llama_cpp_computes_what_the_model_does(name, family, tokenizer, ids, tmp_path, engine):
    model = family(name)
    found, expected = by_llama_cpp(model, tokenizer, ids, tmp_path), logits(model, ids)
    difference = (found - expected).abs().max() / expected.abs().max()
    assert difference < (1e-3 if name in TABLE else 2e-5)
    comparison = verify.compare(expected, found)
    assert comparison.mean_kl < 1e-6 and comparison.top1_agreement > 0.95


def test_every_family_has_an_architecture():
    for spec in families.SPECS:
        if spec.name not in architectures.NOT_IN_LLAMA_CPP:
            assert architectures.find(spec, spec.model_types[0]).arch is not None


ROPES = {
    "llama": {
        "rope_type": "llama3",
        "rope_theta": 100.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "qwen2": {
        "rope_type": "yarn",
        "rope_theta": 100.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "qwen3": {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0},
    "granite": {
        "rope_type": "yarn",
        "rope_theta": 100.0,
        "factor": 4.0,
        "attention_factor": 1.7,
        "original_max_position_embeddings": 16,
    },
}


@pytest.mark.parametrize("name", ROPES)
def test_scaled_rotary_embeddings(name, family, tokenizer, ids, tmp_path, engine):
    model = family(name, rope_parameters=ROPES[name])
    expected = logits(model, ids)
    assert (expected - logits(family(name), ids)).abs().max() > 0.1  # the scaling matters here
    assert (by_llama_cpp(model, tokenizer, ids, tmp_path) - expected).abs().max() < 1e-3


@pytest.mark.parametrize(("tokens", "context"), [(20, 256), (270, 512)])
def test_the_two_sets_of_longrope(tokens, context, family, tokenizer, tmp_path, engine):
    rope = {
        "rope_type": "longrope",
        "rope_theta": 100.0,
        "partial_rotary_factor": 0.5,
        "short_factor": [1.1, 1.2, 1.3, 1.4],
        "long_factor": [2.0, 3.0, 4.0, 5.0],
        "original_max_position_embeddings": 256,
    }
    lengths = {"max_position_embeddings": 1024, "original_max_position_embeddings": 256}
    model = family("phi3", rope_parameters=rope, **lengths)
    ids = [list(range(4, 4 + tokens))] if tokens < 250 else [[4 + n % 250 for n in range(tokens)]]
    convert.plan(model, tokenizer, "f32").write(tmp_path / "model.gguf")
    found = runtime.ask(runtime.Request(tmp_path / "model.gguf", ids=ids, context=context)).logits[0]
    assert (found - logits(model, ids)).abs().max() < 1e-3


def test_deep_models_of_a_family_are_scaled_as_llama_cpp_expects(family, tokenizer, ids, tmp_path, engine):
    """llama.cpp knows Gemma 2 27B by its 46 layers, and scales its scores by another number."""
    sliding = ["sliding_attention", "full_attention"] * 23
    model = family("gemma2", num_hidden_layers=46, layer_types=sliding, head_dim=32)
    expected = logits(model, ids)
    assert verify.compare(expected, by_llama_cpp(model, tokenizer, ids, tmp_path)).mean_kl < 1e-4


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("cohere, head norms", {}, "norms of heads from 64 layers on"),
        ("vaultgemma", {}, "llama.cpp has no such model architecture"),
        ("smollm3", {"no_rope_layers": [1, 0, 1, 1]}, "every layer number 4"),
        ("ernie4_5", {"use_bias": True}, r"no place for the tensor.*bias"),
        ("llama", {"hidden_act": "relu"}, "activation"),
        (
            "cohere2",
            {"num_hidden_layers": 3, "layer_types": ["full_attention", "sliding_attention", "full_attention"]},
            "regular places",
        ),
        ("gemma2", {"attn_logit_softcapping": None}, "always caps"),
        ("qwen3", {"rope_parameters": ROPES["llama"]}, "rotary scaling"),
        ("qwen2", {"rope_parameters": {**ROPES["qwen2"], "beta_fast": 20.0}}, "beta_fast=20"),
    ],
)
def test_what_llama_cpp_does_not_have_is_named(name, changes, message, family, tokenizer):
    with pytest.raises(ExportError, match=message):
        convert.plan(family(name, **changes), tokenizer)


def test_a_family_without_a_rule_is_refused(tokenizer):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=264))
    with pytest.raises(ExportError, match="gpt2.*llama"):
        convert.plan(model, tokenizer)


def test_an_own_head_where_the_architecture_has_none_is_named(family, tokenizer):
    with pytest.raises(ExportError, match="lm_head"):
        convert.plan(family("gemma", tie_word_embeddings=False), tokenizer)


def test_a_window_that_llama_cpp_does_not_have_is_said(family, tokenizer):
    model = family("mistral", sliding_window=16)
    limits = convert.plan(model, tokenizer).metadata.limits
    assert limits == ["llama.cpp has no sliding window for llama: beyond 16 tokens its answers differ"]
