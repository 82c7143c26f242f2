"""LoRA on the MLP of one 8B layer: 4,096 to 14,336 and back, 4,096 tokens, rank 32, bfloat16; see lora_linear.py.

The activation itself is no part of the bare products: at the speed of a copy it takes 8.5% of them.
"""

import torch
from harness import Case, device, main
from lora_linear import RANK, bare_linears, inputs, providers

from unsloth.kernels.lora_mlp import lora_mlp, lora_mlp_reference
from unsloth.kernels.lora_weights import PaddedWeight


def bare_mlp(x, weights, backward):
    """The three products, on whatever data; with ``backward`` their input gradients."""
    first = bare_linears(x, weights[:2], backward)
    h = torch.randn(len(x), weights[2].shape[1], device=device(), dtype=torch.bfloat16)
    second = bare_linears(h, weights[2:], backward)
    return lambda: (first(), second())


def cases(small: bool) -> list[Case]:
    """Forward, forward and backward."""
    tokens, hidden, inner = (8, 64, 96) if small else (4096, 4096, 14336)
    shapes = [(inner, hidden), (inner, hidden), (hidden, inner)]
    buffer, x, weights, adapters = inputs(tokens, shapes)
    gate_up, down = PaddedWeight.from_dense(weights[:2], 2 * RANK), PaddedWeight.from_dense(weights[2:], RANK)
    result = []
    for backward in (False, True):
        found = providers(
            lambda: lora_mlp(x, gate_up, down, adapters),
            lambda: lora_mlp(x, gate_up, down, adapters, buffer=buffer),
            lambda: lora_mlp(x, weights[:2], weights[2], adapters),
            lambda: lora_mlp_reference(x, weights[:2], weights[2], adapters),
            bare_mlp(x, weights, backward),
            x,
            adapters,
            backward,
        )
        case = f"mlp {'forward+backward' if backward else 'forward'}"
        result.append(Case("lora_mlp", case, found, flops=6 * tokens * hidden * inner * (1 + backward)))
    return result


if __name__ == "__main__":
    main("lora_mlp", cases)
