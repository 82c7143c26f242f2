"""SwiGLU against torch.compile and Liger: python bench/kernels/swiglu.py [--dry-run]."""

import torch
from harness import Case, backward, compiled, device, main, peer

from unsloth.kernels.swiglu import swiglu, swiglu_reference


def cases(small: bool) -> list[Case]:
    rows, n = (4, 64) if small else (8192, 14336)
    gate, up = (torch.randn(rows, n, device=device(), dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    fused = torch.randn(rows, 2 * n, device=device(), dtype=torch.bfloat16)
    size, name = gate.nbytes, f"{rows}x{n} bf16"
    reference = compiled(swiglu_reference)

    def liger(fn):
        def build():
            from liger_kernel.ops.swiglu import LigerSiLUMulFunction

            return {"liger": fn(LigerSiLUMulFunction.apply)}

        return peer(build)

    return [
        Case(
            "swiglu",
            f"forward {name}",
            {"ours": lambda: swiglu(gate, up), "compile": lambda: reference(gate, up)}
            | liger(lambda glu: lambda: glu(gate, up)),
            bytes=3 * size,
            bar=0.85,
        ),
        Case(
            "swiglu",
            f"forward, fused halves {name}",
            {"ours": lambda: swiglu(*fused.chunk(2, -1)), "compile": lambda: reference(*fused.chunk(2, -1))},
            bytes=3 * size,
            bar=0.85,
        ),
        Case(
            "swiglu",
            f"backward {name}",
            {"ours": backward(swiglu, (gate, up)), "compile": backward(reference, (gate, up))}
            | liger(
                lambda glu: backward(
                    glu, (gate.detach().clone().requires_grad_(), up.detach().clone().requires_grad_())
                )
            ),
            bytes=5 * size,
            bar=0.85,
        ),
    ]


if __name__ == "__main__":
    main("swiglu", cases)
