"""Query/key norm with RoPE against torch.compile: python bench/kernels/qk_norm_rope.py [--dry-run]."""

import torch
from harness import Case, backward, compiled, device, main

from unsloth.kernels.qk_norm_rope import qk_norm_rope
from unsloth.kernels.rms_norm import rms_norm_reference
from unsloth.kernels.rope import rope_reference, rope_tables


def cases(small: bool) -> list[Case]:
    b, t, heads, k_heads, d = (1, 4, 2, 1, 16) if small else (4, 2048, 32, 8, 128)
    q, k = (torch.randn(b, t, n, d, device=device(), dtype=torch.bfloat16).transpose(1, 2) for n in (heads, k_heads))
    q.requires_grad_()
    k.requires_grad_()
    frozen = [torch.randn(d, device=device(), dtype=torch.bfloat16) for _ in range(2)]
    trained = [x.clone().requires_grad_() for x in frozen]
    inv_freq = 500000.0 ** (-torch.arange(0, d, 2, device=device()).float() / d)
    cos, sin = rope_tables(inv_freq, torch.arange(t, device=device()))
    size, name = q.nbytes + k.nbytes, f"{b}x{t} {heads}+{k_heads}x{d} bf16"

    def formula(q, k, q_weight, k_weight, cos, sin):
        normed = rms_norm_reference(q, q_weight, 1e-6), rms_norm_reference(k, k_weight, 1e-6)
        return tuple(rope_reference(x, cos, sin, d) for x in normed)

    def ours(q, k, q_weight, k_weight, **options):
        return qk_norm_rope(q, k, q_weight, k_weight, cos, sin, rotary_dim=d, **options)

    reference = compiled(formula)
    table = cos[None].expand(b, t, d // 2), sin[None].expand(b, t, d // 2)
    result = [
        Case(
            "qk_norm_rope",
            f"forward {name}",
            {"ours": lambda: ours(q, k, *frozen), "compile": lambda: reference(q, k, *frozen, *table)},
            bytes=2 * size,
            bar=0.85,
        )
    ]
    for weights, what in ((frozen, "frozen"), (trained, "trained")):
        result.append(
            Case(
                "qk_norm_rope",
                f"backward, weights {what} {name}",
                {"ours": backward(ours, (q, k, *weights)), "compile": backward(reference, (q, k, *weights), *table)},
                bytes=3 * size,
                bar=0.85,
            )
        )
    return result


if __name__ == "__main__":
    main("qk_norm_rope", cases)
