"""Log-probabilities of labels with a frozen head, and entropy: python bench/kernels/logprobs.py [--dry-run]."""

import torch
from harness import Case, compiled, device, main

from unsloth.kernels.logprobs import logprobs, logprobs_reference


def both_ways(op, x, weight, labels, **options):
    """The op and the gradient of the hidden states."""
    upstream = torch.randn(len(x), device=device())
    return lambda: torch.autograd.grad(op(x, weight, labels, **options)[0], x, upstream)


def cases(small: bool) -> list[Case]:
    tokens, hidden, vocabulary = (8, 32, 100) if small else (8192, 4096, 151936)
    x = torch.randn(tokens, hidden, device=device(), dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(vocabulary, hidden, device=device(), dtype=torch.bfloat16) / hidden**0.5
    labels = torch.randint(0, vocabulary, (tokens,), device=device())
    result = []
    for entropy in (False, True):
        ops = {"ours": logprobs, "compile": compiled(logprobs_reference), "reference": logprobs_reference}
        found = {name: both_ways(op, x, weight, labels, entropy=entropy) for name, op in ops.items()}
        case = f"{tokens}x{hidden}x{vocabulary}{', entropy' if entropy else ''}"
        result.append(Case("logprobs", case, found, flops=4 * tokens * hidden * vocabulary))
    return result


if __name__ == "__main__":
    main("logprobs", cases)
