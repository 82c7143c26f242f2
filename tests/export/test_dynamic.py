"""Types chosen by measurement: names, the choice, and what it gains."""

import itertools
import json

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type

from unsloth import FastLanguageModel
from unsloth.core.errors import ConfigError, ExportError
from unsloth.export import dynamic, verify
from unsloth.export.dynamic import Option
from unsloth.export.gguf import runtime


@pytest.mark.parametrize(
    ("name", "stands_for", "budget"),
    [
        ("dynamic_q4_k_xl", "ud-q4_k_xl", "q4_k_m"),
        ("UD-Q4_K_XL", "ud-q4_k_xl", "q4_k_m"),
        ("Q2_K_XL", "ud-q2_k_xl", "q2_k"),
        ("q8_K_xl", "ud-q8_k_xl", "q8_0"),
        ("UD-IQ1_M", "ud-iq1_m", "iq1_m"),
        ("ud-tq1_0", "ud-tq1_0", "tq1_0"),
        ("dynamic_q3_k_s", "ud-q3_k_s", "q3_k_s"),
        ("UD-Q4_K", "ud-q4_k_m", "q4_k_m"),
    ],
)
def test_the_documentations_names(name, stands_for, budget):
    from unsloth.export.gguf import methods

    found = dynamic.find(name)
    assert (found.name, found.measured) == (stands_for, True)
    assert found.file_type == methods.find(budget, "bf16").file_type


@pytest.mark.parametrize("name", ["q4_k_m", "IQ1_M", "quantized", "not_quantized", "TQ1_0"])
def test_plain_names_are_not_dynamic(name):
    assert dynamic.find(name) is None


@pytest.mark.parametrize("name", ["dynamic_q9_k_xl", "UD-F16", "dynamic_bf16", "dynamic_not_quantized", "dynamic_"])
def test_names_that_stand_for_nothing(name):
    with pytest.raises(ConfigError):
        dynamic.find(name)


def tables(seed, tensors=4):
    """Random tensors with types of falling divergence, not always convex."""
    generator = np.random.default_rng(seed)
    kinds = (Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q6_K, Type.Q8_0)
    table = {}
    for number in range(tensors):
        sizes = np.cumsum(generator.integers(5, 60, len(kinds)))
        costs = np.sort(generator.exponential(size=len(kinds)))[::-1] * 10 ** generator.uniform(-3, 0)
        table[str(number)] = [Option(k, int(s), float(c)) for k, s, c in zip(kinds, sizes, costs, strict=True)]
    return table


def total(table, types, attribute):
    return sum(getattr(o, attribute) for name, each in table.items() for o in each if o.type is types[name])


@pytest.mark.parametrize("seed", range(20))
def test_no_choice_within_the_budget_is_much_better(seed):
    table = tables(seed)
    smallest = sum(options[0].size for options in table.values())
    largest = sum(options[-1].size for options in table.values())
    for share in (0.0, 0.3, 0.6, 1.0):
        budget = int(smallest + share * (largest - smallest))
        types = dynamic.allocate(table, budget)
        assert total(table, types, "size") <= budget
        best = min(
            sum(option.divergence for option in choice)
            for choice in itertools.product(*table.values())
            if sum(option.size for option in choice) <= budget
        )
        # The greedy choice misses at most the one step that did not fit.
        step = max(
            first.divergence - second.divergence
            for options in table.values()
            for first, second in itertools.pairwise(dynamic._hull(options))
        )
        found = total(table, types, "divergence")
        assert best <= found + 1e-12 and found <= best + step
        if share in (0.0, 1.0):
            assert found == pytest.approx(best)


def test_a_budget_below_the_smallest_types_is_an_error():
    table = tables(0)
    with pytest.raises(ExportError, match="as small as asked"):
        dynamic.allocate(table, sum(options[0].size for options in table.values()) - 1)


@pytest.fixture(scope="module")
def engine():
    if runtime.available() is None:
        pytest.skip("llama.cpp is not installed (extra gguf-run)")


def quantized(folder, method, ids, out, **options):
    """Size, logits and report of a model's file."""
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=128, dtype=torch.float32, load_in_16bit=True
    )
    model.save_pretrained_gguf(out, tokenizer, method, verify=False, **options)
    (path,) = out.glob("*.gguf")
    report = json.loads((out / "manifest.json").read_text())["details"]
    with torch.no_grad():
        expected = torch.cat([model(input_ids=torch.tensor([each])).logits[0] for each in ids])
    found = torch.cat(runtime.ask(runtime.Request(path, ids=ids)).logits)
    return path, verify.compare(expected, found).mean_kl, report


def test_it_is_no_larger_and_closer_to_the_model_than_the_plain_type(wide, tmp_path, engine):
    generator = torch.Generator().manual_seed(9)
    calibration = [{"input_ids": torch.randint(4, 260, (128,), generator=generator).tolist()} for _ in range(8)]
    held_out = [torch.randint(4, 260, (100,), generator=generator).tolist() for _ in range(4)]
    options = {"calibration_data": calibration}
    plain, plain_kl, _ = quantized(wide, "q3_k_m", held_out, tmp_path / "plain", **options)
    path, kl, report = quantized(wide, "dynamic_q3_k_xl", held_out, tmp_path / "dynamic", **options)
    assert path.name.endswith(".UD-Q3_K_XL.gguf")
    assert path.stat().st_size <= plain.stat().st_size
    assert kl < 0.85 * plain_kl
    assert report["importance"] == "list"
    assert len(report["files"][path.name]["types"]) > 3


@pytest.mark.soak
@pytest.mark.model
@pytest.mark.parametrize(("method", "budget"), [("dynamic_q2_k_xl", "q2_k"), ("dynamic_q4_k_xl", "q4_k_m")])
def test_the_real_model(method, budget, smollm2, tmp_path, engine):
    from unsloth.data import demo

    _, tokenizer = FastLanguageModel.from_pretrained(str(smollm2), max_seq_length=512, load_in_16bit=True)
    text = "".join(tokenizer.apply_chat_template(r["messages"], tokenize=False) for r in demo.heldout_rows())
    ids = tokenizer(text, add_special_tokens=False).input_ids[:768]
    held_out = [ids[start : start + 256] for start in range(0, 768, 256)]
    plain, plain_kl, _ = quantized(smollm2, budget, held_out, tmp_path / "plain")
    path, kl, _ = quantized(smollm2, method, held_out, tmp_path / "dynamic")
    assert path.stat().st_size <= plain.stat().st_size
    assert kl < 0.7 * plain_kl
