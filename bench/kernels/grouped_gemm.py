"""Expert linears with LoRA: 16,384 rows over 64 experts, 2,048 to 1,536, rank 16, bfloat16, uneven expert sizes."""

import torch
from harness import Case, device, main
from torch.nn.functional import grouped_mm

from unsloth.kernels.grouped_gemm import grouped_linear, grouped_linear_reference


def cases(small: bool) -> list[Case]:
    """Forward and backward of x, A and B; the peers are the loop over experts and the bare grouped products."""
    rows, experts, features, out, rank = (32, 4, 32, 16, 8) if small else (16384, 64, 2048, 1536, 16)

    def make(*shape):
        return torch.randn(*shape, device=device(), dtype=torch.bfloat16)

    share = torch.rand(experts, device=device()) + 0.2
    ends = (share.cumsum(0) / share.sum() * rows).round().int()
    ends[-1] = rows
    x = make(rows, features).requires_grad_()
    w = make(experts, out, features) / features**0.5
    a = torch.randn(experts, rank, features, device=device()).requires_grad_()
    b = torch.randn(experts, out, rank, device=device()).requires_grad_()
    up = make(rows, out)
    plain = x.detach()
    found = {
        "ours": lambda: torch.autograd.grad(grouped_linear(x, w, ends, a, b), [x, a, b], up),
        "loop": lambda: torch.autograd.grad(grouped_linear_reference(x, w, ends, a, b), [x, a, b], up),
        "bare products": lambda: (grouped_mm(plain, w.transpose(1, 2), offs=ends), grouped_mm(up, w, offs=ends)),
    }
    return [Case("grouped_gemm", "forward+backward", found, flops=4 * rows * features * out)]


if __name__ == "__main__":
    main("grouped_gemm", cases)
