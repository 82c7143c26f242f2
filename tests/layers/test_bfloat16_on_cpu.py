"""Products in bfloat16 on a CPU read no memory that nobody wrote.

With AMX, oneDNN reads rows of a product's left side beyond their end, where their length is no multiple of 32. torch
fills new memory with NaN here, so that whatever is read of it shows.
"""

import copy

import pytest
import torch

from unsloth.kernels.linear_cross_entropy import linear_cross_entropy
from unsloth.kernels.logprobs import logprobs
from unsloth.kernels.lora_linear import lora_linears
from unsloth.kernels.lora_mlp import lora_mlp
from unsloth.kernels.lora_weights import Adapter, PaddedWeight

ROWS, FEATURES, OUT = 64, 100, 260


@pytest.fixture(autouse=True)
def new_memory_is_nan():
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def matrix(*shape):
    return (torch.randn(shape) / shape[-1] ** 0.5).bfloat16()


def check(function, x, parameters, reference):
    """The gradients of x and of the parameters, near those of ``reference`` in float32."""
    found = []
    for compute, dtype in ((function, torch.bfloat16), (reference, torch.float32)):
        inputs = [x.detach().to(dtype).requires_grad_(), *(p.detach().clone().requires_grad_() for p in parameters)]
        result = compute(*inputs).float()
        result.square().mean().backward()
        found.append([result.detach(), *(p.grad.float() for p in inputs)])
    for ours, exact in zip(*found, strict=True):
        assert (ours - exact).norm() <= 0.02 * exact.norm()


@pytest.mark.parametrize("op", [logprobs, linear_cross_entropy])
def test_a_head_whose_vocabulary_is_no_multiple_of_32(op):
    head, labels = matrix(OUT, FEATURES), torch.randint(0, OUT, (ROWS,))

    def run(dtype, fast):
        def compute(x):
            result = op(x, head.to(dtype), labels, fast=fast)
            return result if torch.is_tensor(result) else result[0]

        return compute

    check(run(torch.bfloat16, True), matrix(ROWS, FEATURES), [], run(torch.float32, False))


@pytest.mark.parametrize("padded", [False, True])
def test_adapters_of_layers_whose_sides_are_no_multiples_of_32(padded):
    sizes = [(OUT, FEATURES), (OUT, FEATURES), (FEATURES, OUT)]
    weights = [matrix(*size) for size in sizes]
    pairs = [p for out, k in sizes for p in (torch.randn(4, k) / k**0.5, torch.randn(out, 4))]

    def adapters(pairs):
        return [Adapter(a, b, 0.5) for a, b in zip(pairs[::2], pairs[1::2], strict=True)]

    def form(some, dtype, fast):
        if padded and fast:
            return PaddedWeight.from_dense(some, 4 * len(some))
        return [w.to(dtype) for w in some]

    def run(dtype, fast):
        def mlp(x, *pairs):
            down = form(weights[2:], dtype, fast)
            down = down[0] if isinstance(down, list) else down
            return lora_mlp(x, form(weights[:2], dtype, fast), down, adapters(pairs), fast=fast)

        def linears(x, *pairs):
            return torch.cat(lora_linears(x, form(weights[:2], dtype, fast), adapters(pairs), fast=fast), dim=-1)

        return mlp, linears

    for ours, exact, used in zip(run(torch.bfloat16, True), run(torch.float32, False), (6, 4), strict=True):
        check(ours, matrix(ROWS, FEATURES), copy.deepcopy(pairs[:used]), exact)
