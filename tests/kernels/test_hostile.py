"""Inputs that once gave garbage, wrote where nothing was theirs, or failed without a word on what to do."""

import dataclasses

import pytest
import torch
from test_nf4_matmul import quantize
from test_paged_attention import make as make_paged
from test_paged_prefill import make as make_prefill
from test_rope_to_pages import make as make_rope
from test_sample_rows import make as make_sample

from unsloth.core.errors import ConfigError
from unsloth.kernels.cut_rows import cut_rows
from unsloth.kernels.decoding_linears import StackedAdapters, decoding_linears
from unsloth.kernels.grouped_gemm import grouped_linear
from unsloth.kernels.host_gather import host_gather
from unsloth.kernels.layer_norm import add_layer_norm, layer_norm
from unsloth.kernels.logprobs import logprobs
from unsloth.kernels.lora_linear import lora_linear
from unsloth.kernels.lora_mlp import lora_mlp
from unsloth.kernels.lora_rows import lora_rows
from unsloth.kernels.lora_weights import Adapter, PaddedWeight
from unsloth.kernels.paged_attention import paged_attention
from unsloth.kernels.paged_prefill import paged_prefill
from unsloth.kernels.qk_norm_rope import qk_norm_rope
from unsloth.kernels.rms_norm import add_rms_norm, rms_norm
from unsloth.kernels.rope import rope, rope_tables
from unsloth.kernels.rope_to_pages import rope_to_pages
from unsloth.kernels.sample_rows import sample_rows
from unsloth.kernels.varlen_attention import varlen_attention


def apart(x):
    """The same values, every second element of a row of a wider tensor, between NaN (or a wild number)."""
    wide = x.new_full(
        (*x.shape[:-1], 2 * x.shape[-1]),
        float("nan") if x.is_floating_point() else min(10**6, torch.iinfo(x.dtype).max),
    )
    wide[..., ::2] = x
    return wide[..., ::2]


def norm_rope(q_weight, k_weight):
    tables = rope_tables(torch.linspace(0, 1, 8, device=q_weight.device), torch.arange(5, device=q_weight.device))
    torch.manual_seed(1)
    q, k = torch.randn(1, 2, 5, 16, device=q_weight.device), torch.randn(1, 1, 5, 16, device=q_weight.device)
    return qk_norm_rope(q, k, q_weight, k_weight, *tables)[0]


@pytest.mark.parametrize(
    "op",
    [
        lambda x, w: rms_norm(x, w),
        lambda x, w: add_rms_norm(x, x, w)[0],
        lambda x, w: layer_norm(x, w, w),
        lambda x, w: add_layer_norm(x, x, w, w)[0],
        lambda x, w: norm_rope(w, w),
    ],
    ids=["rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm", "qk_norm_rope"],
)
def test_weights_whose_elements_are_apart(device, op):
    x, weight = torch.randn(3, 16, device=device), torch.randn(16, device=device)
    other = apart(weight).requires_grad_()
    weight.requires_grad_()
    first, second = op(x, weight), op(x, other)
    torch.testing.assert_close(second, first)
    torch.testing.assert_close(*(torch.autograd.grad(y.sum(), w)[0] for y, w in ((second, other), (first, weight))))


def test_numbers_of_a_decoding_step_that_are_apart(device):
    logits = torch.randn(5, 40, device=device)
    limits = [torch.ones(5, device=device), torch.full((5,), 7, dtype=torch.int32, device=device)]
    limits += [torch.full((5,), 0.9, device=device), torch.zeros(5, device=device)]
    assert torch.equal(cut_rows(logits, *map(apart, limits)), cut_rows(logits, *limits))
    raw, temperature, keys = make_sample(device)
    for found, plain in zip(
        sample_rows(raw, raw, apart(temperature), None, apart(keys)),
        sample_rows(raw, raw, temperature, None, keys), strict=True,
    ):  # fmt: skip
        assert torch.equal(found, plain)
    q, k, v, table, lengths = make_paged(device)
    assert torch.equal(paged_attention(q, k, v, table, apart(lengths)), paged_attention(q, k, v, table, lengths))
    q, k, v, table, tiles = make_prefill(device)
    plain = paged_prefill(q, k, v, table, tiles, scale=0.2)
    assert torch.equal(paged_prefill(q, k, v, apart(table), apart(tiles), scale=0.2), plain)


def test_nothing_is_written_beyond_an_output(device):
    q, k, v, table, tiles = make_prefill(device)
    plain = paged_prefill(q, k, v, table, tiles, scale=0.2)
    assert torch.equal(paged_prefill(q[:-1], k, v, table, tiles, scale=0.2), plain[:-1])
    inputs = make_rope(device)
    inputs[6] = inputs[6].clone()
    inputs[6][0] = 7 * 4  # one past the last place
    rope_to_pages(*inputs)
    for cache in inputs[-2:]:
        assert int(cache.flatten(0, 1).flatten(1).any(1).sum()) == 4  # the other tokens' places


def lora_case(device):
    x, a, b = torch.randn(5, 64, device=device), torch.randn(16, 64, device=device), torch.randn(24, 16, device=device)
    return x, a, b, torch.randn(5, 24, device=device)


def test_matrices_of_lora_rows_that_are_not_contiguous(device):
    x, a, b, y = lora_case(device)
    outputs = []
    for form in (lambda t: t, lambda t: torch.stack((t, t), 1)[:, 0]):
        outputs.append(y.clone())
        lora_rows(x, form(a), [form(b)], [outputs[-1]])
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["x", "a", "b", "y"])
@pytest.mark.parametrize("wrong", [lambda t: t[:, :-1], lambda t: t[:-1], lambda t: t.to("meta"), lambda t: t.long()])
def test_lora_rows_refuses(device, name, wrong):
    case = dict(zip("xaby", lora_case(device), strict=True))
    case[name] = wrong(case[name])
    with pytest.raises(ConfigError, match="lora_rows"):
        lora_rows(case["x"], case["a"], [case["b"]], [case["y"]])


@pytest.mark.parametrize("name", ["x", "a", "b"])
@pytest.mark.parametrize("wrong", [lambda t: t[:, :-1], lambda t: t.to("meta"), lambda t: t.reshape(-1)])
@pytest.mark.parametrize("rows", [5, 40])
def test_products_with_adapters_refuse(device, name, wrong, rows):
    torch.manual_seed(0)
    case = {"x": torch.randn(rows, 128, device=device).half(), "a": torch.randn(16, 128, device=device).half()}
    case["b"] = torch.randn(24, 16, device=device).half()
    case[name] = wrong(case[name])
    with pytest.raises(ConfigError):
        adapters = StackedAdapters(case["a"], (case["b"],), (0.5,))
        decoding_linears(case["x"], [quantize(24, 128, device)], adapters)


@pytest.mark.parametrize("wrong", [lambda t: t.to("meta"), lambda t: t.reshape(-1), lambda t: t.long()])
@pytest.mark.parametrize("place", range(3))
def test_linears_with_adapters_refuse(device, wrong, place):
    tensors = [torch.randn(8, 16, device=device), torch.randn(4, 16, device=device), torch.randn(8, 4, device=device)]
    tensors[place] = wrong(tensors[place])
    weight, a, b = tensors
    with pytest.raises(ConfigError):
        lora_linear(torch.randn(3, 16, device=device), weight, Adapter(a, b))
    with pytest.raises(ConfigError):
        x, up, down = (torch.randn(*s, device=device) for s in ((3, 16), (8, 16), (16, 8)))
        lora_mlp(x, [weight, up], down, [Adapter(a, b), None, None])


def test_gate_and_up_of_different_width(device):
    x, gate, up, down = (torch.randn(*s, device=device) for s in ((3, 16), (8, 16), (7, 16), (16, 8)))
    with pytest.raises(ConfigError, match="differ in features"):
        lora_mlp(x, [gate, up], down, [None] * 3)


def test_other_devices_and_bounds_are_refused(device):
    x, weight = torch.randn(4, 16, device=device), torch.randn(2, 8, 16, device=device)
    ends = torch.tensor([2, 4], dtype=torch.int32, device=device)
    for tensors in ((x.to("meta"), weight, ends), (x, weight.to("meta"), ends), (x, weight, ends.to("meta"))):
        with pytest.raises(ConfigError, match="another device"):
            grouped_linear(*tensors)
    q = torch.randn(6, 2, 16, device=device)
    with pytest.raises(ConfigError, match="another device"):
        varlen_attention(q, q, q, torch.tensor([0, 6], device="meta"))
    if device.type == "cpu":
        for bounds in ([0, 5], [1, 6], []):
            with pytest.raises(ConfigError, match="does not cover"):
                varlen_attention(q, q, q, torch.tensor(bounds, dtype=torch.int32))
    with pytest.raises(ConfigError, match="contiguous matrix"):
        host_gather(torch.randn(4, 6).T, torch.tensor([0]))
    with pytest.raises(ConfigError, match="must hold integers"):
        host_gather(torch.randn(4, 6), torch.tensor([0.0]))


def test_sequences_longer_than_their_row_of_the_page_table(device):
    q, k, v, table, lengths = make_paged(device)
    plain, short = paged_attention(q, k, v, table, lengths), table[:, :3]  # 48 tokens, and the second sequence has 70
    found = paged_attention(q, k, v, short, lengths)
    assert found[1].isnan().all() and torch.equal(found[[0, 2, 3]], plain[[0, 2, 3]])
    with pytest.raises(ConfigError, match="longer than its row"):
        paged_attention(q, k, v, short, lengths, fast=False)
    q, k, v, table, tiles = make_prefill(device)
    plain, short = paged_prefill(q, k, v, table, tiles, scale=0.2), table[:, :2]  # 32 tokens of 1, 40, 35 and 40
    late = torch.tensor([i for first, last in ((33, 41), (43, 46), (71, 79)) for i in range(first, last)])
    early = torch.tensor([i for i in range(len(q)) if i not in late.tolist()])
    found = paged_prefill(q, k, v, short, tiles, scale=0.2)
    assert found[late].isnan().all() and torch.equal(found[early], plain[early])
    with pytest.raises(ConfigError, match="beyond its row"):
        paged_prefill(q, k, v, short, tiles, scale=0.2, fast=False)


def test_parts_of_4_bit_weights_that_do_not_fit(device):
    weight = quantize(24, 128, device)
    for name in ("absmax", "code", "nested_code", "nested_absmax", "offset"):
        tensor = getattr(weight, name)
        wrong = [tensor.double(), torch.cat([tensor.flatten(), tensor.flatten()]), tensor.to("meta")]
        for value in [*wrong, apart(tensor)] if tensor.dim() and tensor.numel() > 1 else wrong:
            with pytest.raises(ConfigError, match=f"4-bit weight: .*({name}|scales)"):
                dataclasses.replace(weight, **{name: value})


def test_weights_of_one_input_that_do_not_fit(device):
    x = torch.randn(3, 16, device=device)
    weight, other = torch.randn(8, 16, device=device), torch.randn(8, 12, device=device)
    for weights in ([weight.flatten()], [weight, other], [weight, weight.double()], [weight, weight.to("meta")]):
        with pytest.raises(ConfigError, match="do not fit together"):
            PaddedWeight.from_dense(weights, 4)
    for bias in (torch.randn(7, device=device), torch.randn(1, 8, device=device), torch.arange(8, device=device)):
        with pytest.raises(ConfigError, match="bias 0"):
            lora_linear(x, weight, None, bias)


def test_tables_ends_and_biases_that_do_not_fit(device):
    q = torch.randn(1, 2, 5, 16, device=device)
    with pytest.raises(ConfigError, match="no rows"):
        rope(q, None, torch.tensor(1.0, device=device), torch.tensor(1.0, device=device))
    with pytest.raises(ConfigError, match="bias does not fit"):
        labels = torch.zeros(3, dtype=torch.long, device=device)
        logprobs(torch.randn(3, 8, device=device), torch.randn(9, 8, device=device), labels, torch.arange(9))
    heads = torch.randn(6, 2, 16, device=device)
    with pytest.raises(ConfigError, match="sinks"):
        bounds = torch.tensor([0, 6], device=device)
        varlen_attention(heads, heads, heads, bounds, sinks=torch.arange(2, device=device))
    if device.type == "cpu":
        for ends in ([2, 5], [4, 2], [3, 7]):
            with pytest.raises(ConfigError, match="do not cover"):
                grouped_linear(torch.randn(6, 16), torch.randn(2, 8, 16), torch.tensor(ends))
