"""GEGLU against torch.compile and Liger: python bench/kernels/geglu.py [--dry-run]."""

import torch
from harness import Case, backward, compiled, device, main, peer

from unsloth.kernels.geglu import geglu, geglu_reference


def cases(small: bool) -> list[Case]:
    rows, n = (4, 64) if small else (8192, 14336)
    gate, up = (torch.randn(rows, n, device=device(), dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    size, name = gate.nbytes, f"{rows}x{n} bf16"
    reference = compiled(geglu_reference)

    def liger(fn):
        def build():
            from liger_kernel.ops.geglu import LigerGELUMulFunction

            return {"liger": fn(LigerGELUMulFunction.apply)}

        return peer(build)

    result = []
    for tanh, what in ((True, "tanh"), (False, "exact")):

        def ours(gate, up, tanh=tanh):
            return geglu(gate, up, tanh=tanh)

        def peers(fn, tanh=tanh):
            return liger(fn) if tanh else {}  # Liger has only the tanh form

        result += [
            Case(
                "geglu",
                f"{what} forward {name}",
                {"ours": lambda f=ours: f(gate, up), "compile": lambda tanh=tanh: reference(gate, up, tanh)}
                | peers(lambda glu: lambda: glu(gate, up)),
                bytes=3 * size,
                bar=0.85,
            ),
            Case(
                "geglu",
                f"{what} backward {name}",
                {"ours": backward(ours, (gate, up)), "compile": backward(reference, (gate, up), tanh)}
                | peers(
                    lambda glu: backward(
                        glu, (gate.detach().clone().requires_grad_(), up.detach().clone().requires_grad_())
                    )
                ),
                bytes=5 * size,
                bar=0.85,
            ),
        ]
    return result


if __name__ == "__main__":
    main("geglu", cases)
