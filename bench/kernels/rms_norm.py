"""RMSNorm against torch.compile and Liger: python bench/kernels/rms_norm.py [--dry-run]."""

import torch
from harness import Case, backward, compiled, device, main, peer

from unsloth.kernels.rms_norm import add_rms_norm, rms_norm, rms_norm_reference


def add_reference(x, residual, weight, eps):
    h = x + residual
    return rms_norm_reference(h, weight, eps), h


def cases(small: bool) -> list[Case]:
    rows, n = (4, 64) if small else (8192, 4096)
    x, residual = (torch.randn(rows, n, device=device(), dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    frozen = torch.randn(n, device=device(), dtype=torch.bfloat16)
    trained = frozen.clone().requires_grad_()
    size, name = x.nbytes, f"{rows}x{n} bf16"
    reference, sum_reference = compiled(rms_norm_reference), compiled(add_reference)

    def liger(fn):
        def build():
            from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
            from liger_kernel.ops.rms_norm import LigerRMSNormFunction

            return {"liger": fn(LigerRMSNormFunction, LigerFusedAddRMSNormFunction)}

        return peer(build)

    def plain(norm, w):
        return norm.apply(x, w, 1e-6, 0.0, "llama", False)

    def added(norm, w):
        return norm.apply(x, residual, w, 1e-6, 0.0, "llama", False)

    result = [
        Case(
            "rms_norm",
            f"forward {name}",
            {"ours": lambda: rms_norm(x, frozen), "compile": lambda: reference(x, frozen, 1e-6)}
            | liger(lambda norm, _: lambda: plain(norm, frozen)),
            bytes=2 * size,
            bar=0.85,
        ),
        Case(
            "rms_norm",
            f"add forward {name}",
            {
                "ours": lambda: add_rms_norm(x, residual, frozen),
                "compile": lambda: sum_reference(x, residual, frozen, 1e-6),
            }
            | liger(lambda _, norm: lambda: added(norm, frozen)),
            bytes=4 * size,
            bar=0.85,
        ),
    ]
    for w, what in ((frozen, "frozen"), (trained, "trained")):
        result += [
            Case(
                "rms_norm",
                f"backward, weight {what} {name}",
                {"ours": backward(rms_norm, (x, w)), "compile": backward(reference, (x, w), 1e-6)}
                | liger(lambda norm, _, w=w: backward(lambda x, w: plain(norm, w), (x, w))),
                bytes=3 * size,
                bar=0.85,
            ),
            Case(
                "rms_norm",
                f"add backward, weight {what} {name}",
                {
                    "ours": backward(add_rms_norm, (x, residual, w)),
                    "compile": backward(sum_reference, (x, residual, w), 1e-6),
                }
                | liger(lambda _, norm, w=w: backward(lambda x, r, w: added(norm, w), (x, residual, w))),
                bytes=4 * size,
                bar=0.85,
            ),
        ]
    return result


if __name__ == "__main__":
    main("rms_norm", cases)
