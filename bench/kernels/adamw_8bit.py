"""AdamW with 8-bit moments over the adapters of an 8B model: python bench/kernels/adamw_8bit.py [--dry-run].

448 float32 tensors, rank 32 on the seven linears of 32 layers: 84 million values. "ours, kernel" is the launch alone,
the others are whole steps of optimizers: what of their Python the GPU waits for is in the figure. bitsandbytes' states
are 8-bit as well, torch's float32 (24 bytes a value and step more).
"""

import torch
from harness import Case, device, main, peer

from unsloth.kernels.adamw_8bit import BLOCK, AdamWStep, Launch, Moments, adamw_8bit
from unsloth.train.adamw_8bit import AdamW8bit, create_dynamic_map

RANK, HIDDEN, KEYS, INNER, LAYERS = 32, 4096, 1024, 14336, 32
LINEARS = 2 * [(HIDDEN, HIDDEN)] + 2 * [(KEYS, HIDDEN)] + 2 * [(INNER, HIDDEN)] + [(HIDDEN, INNER)]


def tensors(small: bool) -> list[torch.Tensor]:
    """A (32, in) and B (out, 32) of every linear, with gradients."""
    shapes = [(4, 64), (64, 4)] if small else LAYERS * [s for out, k in LINEARS for s in ((RANK, k), (out, RANK))]
    made = [torch.randn(shape, device=device()).requires_grad_() for shape in shapes]
    for tensor in made:
        tensor.grad = torch.randn_like(tensor)
    return made


def kernel_alone(parameters: list[torch.Tensor]):
    """One step of the kernel, whose launch table is made already."""
    codes = torch.stack([create_dynamic_map(signed=signed) for signed in (True, False)]).to(device(), torch.float32)
    values = [parameter.detach() for parameter in parameters]
    gradients = [parameter.grad for parameter in parameters]
    moments = []
    for value in values:
        bytes_ = [torch.full_like(value, 128 if first else 0, dtype=torch.uint8) for first in (True, False)]
        scales = [torch.zeros(-(-value.numel() // BLOCK), device=device()) for _ in range(2)]
        moments.append(Moments(*bytes_, *scales))
    launch = Launch(values, codes) if torch.cuda.is_available() else None
    step = AdamWStep(1e-4, 0.9, 0.999, 1e-8, 0.01, 10)
    return lambda: adamw_8bit(values, gradients, moments, codes, step, launch=launch)


def cases(small: bool) -> list[Case]:
    parameters = tensors(small)
    count = sum(parameter.numel() for parameter in parameters)

    def bitsandbytes():
        from bitsandbytes.optim import AdamW8bit as Theirs

        return {"bitsandbytes": Theirs(tensors(small), lr=1e-4).step}

    found = {"ours": AdamW8bit(parameters, lr=1e-4).step, "ours, kernel": kernel_alone(parameters)}
    found |= peer(bitsandbytes)
    fused = torch.optim.AdamW(tensors(small), lr=1e-4, fused=True)
    found["torch fused, float32 moments"] = fused.step
    # parameter and both moments read and written, gradient and tables of scales read
    size = count * (4 + 4 + 1 + 1 + 4 + 1 + 1) + 4 * 4 * count // BLOCK
    return [Case("adamw_8bit", f"{len(parameters)} tensors, {count / 1e6:.0f}M values", found, bytes=size, bar=0.85)]


if __name__ == "__main__":
    main("adamw_8bit", cases)
