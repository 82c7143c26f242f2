"""LoRA on the linears of one 8B layer: q/k/v and one 4,096-square linear; 4,096 tokens, rank 32, bfloat16.

"bare products" are the base weights' products alone (forward; forward and input gradient), the floor that the bar of
15% refers to. "graph" providers replay captured graphs, so that launches from Python do not count. Peers: the reference
as PEFT writes it, and torch.compile of it.
"""

import torch
from harness import Case, compiled, device, graphed, main

from unsloth.kernels.lora_linear import lora_linears, lora_linears_reference
from unsloth.kernels.lora_weights import Adapter, PaddedWeight, padded_rank

RANK, SCALE = 32, 0.5


def inputs(tokens, shapes):
    """A buffer, x in its first columns, (out, in) weights, float32 adapters."""
    columns = shapes[0][1]
    room = padded_rank(RANK * sum(k == columns for _, k in shapes))
    buffer = torch.randn(tokens, columns + room, device=device(), dtype=torch.bfloat16)
    x = buffer[:, :columns].detach().requires_grad_()
    weights = [torch.randn(*s, device=device(), dtype=torch.bfloat16) / s[1] ** 0.5 for s in shapes]
    pairs = [
        (torch.randn(RANK, k, device=device()) / k**0.5, torch.randn(out, RANK, device=device()) / RANK**0.5)
        for out, k in shapes
    ]
    return buffer, x, weights, [Adapter(a.requires_grad_(), b.requires_grad_(), SCALE) for a, b in pairs]


def forward_only(op):
    """The op without autograd."""

    def step():
        with torch.no_grad():
            return op()

    return step


def both_ways(op, x, adapters):
    """The op and the gradients of x and of all adapters."""
    leaves = [x, *(t for adapter in adapters for t in (adapter.a, adapter.b))]
    with torch.no_grad():
        shapes = op()
    outputs = shapes if isinstance(shapes, tuple) else (shapes,)
    upstream = [torch.randn_like(y).contiguous() for y in outputs]

    def step():
        got = op()
        return torch.autograd.grad(got if isinstance(got, tuple) else (got,), leaves, upstream)

    return step


def bare_linears(x, weights, backward):
    """x W^T for every weight; with ``backward`` the sum of g W as well."""
    x = x.detach()
    grads = [torch.randn(len(x), w.shape[0], device=device(), dtype=torch.bfloat16) for w in weights]

    def step():
        for w in weights:
            x @ w.t()
        if backward:
            dx = grads[0] @ weights[0]
            for g, w in zip(grads[1:], weights[1:], strict=True):
                dx.addmm_(g, w)

    return step


def providers(ours, buffered, plain, reference, bare, x, adapters, backward):
    """By name; ``ours`` with padded weights, ``ours plain`` with plain ones, ``in buffer`` without the copy of x."""
    wrap = (lambda op: both_ways(op, x, adapters)) if backward else forward_only
    return {
        "ours": wrap(ours),
        "ours graph": graphed(wrap(ours)),
        "in buffer graph": graphed(wrap(buffered)),
        "ours plain": wrap(plain),
        "compiled": wrap(compiled(reference)),
        "reference": wrap(reference),
        "bare products": bare,
        "bare graph": graphed(bare),
    }


def cases(small: bool) -> list[Case]:
    """q/k/v, o; forward, forward and backward."""
    result = []
    tokens, hidden, keys = (8, 64, 32) if small else (4096, 4096, 1024)
    groups = {"qkv": [(hidden, hidden), (keys, hidden), (keys, hidden)], "o": [(hidden, hidden)]}
    for name, shapes in groups.items():
        buffer, x, weights, adapters = inputs(tokens, shapes)
        padded = PaddedWeight.from_dense(weights, RANK * len(shapes))
        flops = sum(2 * tokens * out * k for out, k in shapes)
        for backward in (False, True):
            found = providers(
                lambda x=x, p=padded, a=adapters: lora_linears(x, p, a),
                lambda x=x, p=padded, a=adapters, b=buffer: lora_linears(x, p, a, buffer=b),
                lambda x=x, w=weights, a=adapters: lora_linears(x, w, a),
                lambda x=x, w=weights, a=adapters: lora_linears_reference(x, w, a),
                bare_linears(x, weights, backward),
                x,
                adapters,
                backward,
            )
            case = f"{name} {'forward+backward' if backward else 'forward'}"
            result.append(Case("lora_linear", case, found, flops=flops * (1 + backward)))
    return result


if __name__ == "__main__":
    main("lora_linear", cases)
