"""LayerNorm against torch.compile and Liger: python bench/kernels/layer_norm.py [--dry-run]."""

import torch
from harness import Case, backward, compiled, device, main, peer

from unsloth.kernels.layer_norm import add_layer_norm, layer_norm, layer_norm_reference


def add_reference(x, residual, weight, bias, eps):
    return layer_norm_reference(x + residual, weight, bias, eps), x + residual


def cases(small: bool) -> list[Case]:
    rows, n = (4, 64) if small else (8192, 4096)
    x, residual = (torch.randn(rows, n, device=device(), dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    w, b = (torch.randn(n, device=device(), dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    frozen = w.detach(), b.detach()
    size, name = x.nbytes, f"{rows}x{n} bf16"
    reference, sum_reference = compiled(layer_norm_reference), compiled(add_reference)

    def liger(fn):
        def build():
            from liger_kernel.ops.layer_norm import LigerLayerNormFunction

            return {"liger": fn(LigerLayerNormFunction)}

        return peer(build)

    return [
        Case(
            "layer_norm",
            f"forward {name}",
            {"ours": lambda: layer_norm(x, w, b), "compile": lambda: reference(x, w, b, 1e-5)}
            | liger(lambda norm: lambda: norm.apply(x, w, b, 1e-5)),
            bytes=2 * size,
            bar=0.85,
        ),
        Case(
            "layer_norm",
            f"add forward {name}",
            {
                "ours": lambda: add_layer_norm(x, residual, w, b),
                "compile": lambda: sum_reference(x, residual, w, b, 1e-5),
            },
            bytes=4 * size,
            bar=0.85,
        ),
        Case(
            "layer_norm",
            f"backward, frozen {name}",
            {"ours": backward(layer_norm, (x, *frozen)), "compile": backward(reference, (x, *frozen), 1e-5)},
            bytes=3 * size,
            bar=0.85,
        ),
        Case(
            "layer_norm",
            f"backward, trained {name}",
            {"ours": backward(layer_norm, (x, w, b)), "compile": backward(reference, (x, w, b), 1e-5)}
            | liger(lambda norm: backward(norm.apply, (x, w, b), 1e-5)),
            bytes=3 * size,
            bar=0.85,
        ),
        Case(
            "layer_norm",
            f"add backward, trained {name}",
            {
                "ours": backward(add_layer_norm, (x, residual, w, b)),
                "compile": backward(sum_reference, (x, residual, w, b), 1e-5),
            },
            bytes=4 * size,
            bar=0.85,
        ),
    ]


if __name__ == "__main__":
    main("layer_norm", cases)
