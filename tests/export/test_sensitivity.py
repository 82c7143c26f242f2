"""Predicted against real divergence: what rounding a tensor does to the model's predictions."""

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize

from unsloth import FastLanguageModel
from unsloth.export import calibration, sensitivity, verify
from unsloth.export.gguf import convert, quantize
from unsloth.export.gguf.file import Reader
from unsloth.export.sensitivity import Term


def load(folder):
    return FastLanguageModel.from_pretrained(str(folder), max_seq_length=128, dtype=torch.float32, load_in_16bit=True)


@pytest.fixture(scope="module")
def random_text(tokenizer):
    """Random tokens: a random model has no others."""
    generator = torch.Generator().manual_seed(5)
    rows = [{"input_ids": torch.randint(4, 260, (64,), generator=generator).tolist()} for _ in range(12)]
    return calibration.read(rows, tokenizer, length=64)


@torch.no_grad()
def logits(model, text):
    return torch.cat([model(input_ids=chunk[None]).logits[0] for chunk in text.chunks])


@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("qwen2", False)])
def test_the_predicted_divergence_is_the_real_one(family, tied, tiny, random_text, tmp_path):
    model, tokenizer = load(tiny(family, tied))
    conversion = convert.plan(model, tokenizer, "f32")
    conversion.write(tmp_path / "source.gguf")
    source = Reader(tmp_path / "source.gguf")
    _, terms = sensitivity.measure(model, conversion, random_text)
    expected = logits(model, random_text)
    weights = {rule.name: (name, rule) for name, rule in conversion.rules.items()}
    ratios = {}
    for tensor in source:
        if tensor.name not in terms:
            continue
        predicted = sensitivity.divergences(source, tensor, terms[tensor.name], [Type.Q8_0], None)[Type.Q8_0]
        name, rule = weights[tensor.name]
        parameter = model.get_parameter(name)
        exact = source.float32(tensor)
        rows = quantize.encode(exact, Type.Q8_0).reshape(len(exact), -1)
        change = torch.from_numpy(dequantize(rows, Type.Q8_0) - exact)
        if rule.heads:
            change = change.reshape(rule.heads, -1, 2, change.shape[1]).transpose(1, 2).reshape(change.shape)
        before = parameter.detach().clone()
        parameter.data += change
        real = verify.compare(expected, logits(model, random_text)).mean_kl
        parameter.data.copy_(before)
        ratios[tensor.name] = predicted / real
    assert len(ratios) == (15 if tied else 16)
    assert all(0.5 < ratio < 2 for ratio in ratios.values()), ratios
    assert 0.8 < np.exp(np.mean(np.log(list(ratios.values())))) < 1.25, ratios


def test_rows_of_queries_are_in_the_order_of_the_file(tiny, random_text):
    """Keys that are zero in one rotated pair of dimensions take the gradient from the queries of that pair."""
    model, tokenizer = load(tiny("llama"))
    with torch.no_grad():
        keys = model.model.layers[0].self_attn.k_proj.weight
        for head in range(2):
            keys[head * 16 + 3] = keys[head * 16 + 3 + 8] = 0
    _, terms = sensitivity.measure(model, convert.plan(model, tokenizer), random_text)
    rows = terms["blk.0.attn_q.weight"][0].rows.reshape(4, 16)
    assert np.flatnonzero(rows.sum(0) == 0).tolist() == [6, 7]  # neighbours, where the model has 3 and 11


def test_a_sample_of_the_rows_stands_for_all_of_them(tmp_path, tiny):
    model, tokenizer = load(tiny("llama"))
    generator = np.random.default_rng(0)
    rows, width = 4000, 64
    scales = generator.exponential(size=(rows, 1))
    matrix = (generator.normal(size=(rows, width)) * scales).astype(np.float32)
    term = Term(generator.exponential(size=rows) ** 4, generator.exponential(size=width).astype(np.float32))
    exact = 0.5 * float(term.rows @ (((sensitivity._rounded(matrix, Type.Q4_0, None) - matrix) ** 2) @ term.columns))
    conversion = convert.plan(model, tokenizer, "f32")
    conversion.write(tmp_path / "source.gguf")
    source = Reader(tmp_path / "source.gguf")
    embedding = next(tensor for tensor in source if tensor.name == "token_embd.weight")
    source.raw = lambda tensor: matrix.reshape(-1).view(np.uint8)
    tensor = type(embedding)("many", (rows, width), embedding.type, 0, matrix.nbytes)
    found = sensitivity.divergences(source, tensor, [term], [Type.Q4_0], None)[Type.Q4_0]
    assert exact * 0.75 < found < exact * 1.33


def test_a_training_run_goes_on_as_if_nothing_had_been(tiny, random_text):
    model, tokenizer = load(tiny("llama"))
    model = FastLanguageModel.get_peft_model(model, r=4)
    model.train()
    state, hooks = torch.get_rng_state(), [len(module._forward_hooks) for module in model.modules()]
    sensitivity.measure(model, convert.plan(model, tokenizer), random_text)
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert hooks == [len(module._forward_hooks) for module in model.modules()]


def test_adapters_count(tiny, random_text):
    """The sensitivities are those of the merged model."""
    model, tokenizer = load(tiny("llama"))
    conversion = convert.plan(model, tokenizer)
    _, before = sensitivity.measure(model, conversion, random_text)
    model = FastLanguageModel.get_peft_model(model, r=4)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    _, adapted = sensitivity.measure(model, convert.plan(model, tokenizer), random_text)
    merged = model.merge_and_unload()
    _, after = sensitivity.measure(merged, convert.plan(merged, tokenizer), random_text)
    name = "blk.1.ffn_down.weight"
    np.testing.assert_allclose(adapted[name][0].rows, after[name][0].rows, rtol=1e-3)
    assert not np.allclose(adapted[name][0].rows, before[name][0].rows, rtol=0.05)
