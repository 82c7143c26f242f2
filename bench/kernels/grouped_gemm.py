"""Expert linears with LoRA: 16,384 rows over 64 experts, 2,048 to 1,536, rank 16, bfloat16, uneven expert sizes."""

import torch
from harness import Case, main
from torch.nn.functional import grouped_mm

from unsloth.kernels.grouped_gemm import grouped_linear, grouped_linear_reference

ROWS, EXPERTS, FEATURES, OUT, RANK = 16384, 64, 2048, 1536, 16


def build() -> list[Case]:
    """Forward and backward of x, A and B; the peers are the loop over experts and the bare grouped products."""
    share = torch.rand(EXPERTS, device="cuda") + 0.2
    ends = (share.cumsum(0) / share.sum() * ROWS).round().int()
    ends[-1] = ROWS
    x = torch.randn(ROWS, FEATURES, device="cuda", dtype=torch.bfloat16).requires_grad_()
    w = torch.randn(EXPERTS, OUT, FEATURES, device="cuda", dtype=torch.bfloat16) / FEATURES**0.5
    a = torch.randn(EXPERTS, RANK, FEATURES, device="cuda").requires_grad_()
    b = torch.randn(EXPERTS, OUT, RANK, device="cuda").requires_grad_()
    up = torch.randn(ROWS, OUT, device="cuda", dtype=torch.bfloat16)
    plain = x.detach()
    found = {
        "ours": lambda: torch.autograd.grad(grouped_linear(x, w, ends, a, b), [x, a, b], up),
        "loop": lambda: torch.autograd.grad(grouped_linear_reference(x, w, ends, a, b), [x, a, b], up),
        "bare products": lambda: (grouped_mm(plain, w.transpose(1, 2), offs=ends), grouped_mm(up, w, offs=ends)),
    }
    return [Case("grouped_gemm", "forward+backward", found, flops=4 * ROWS * FEATURES * OUT)]


if __name__ == "__main__":
    main("grouped_gemm", build)
