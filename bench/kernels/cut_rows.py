"""Bounds of top-k, top-p and min-p for every row of logits: python bench/kernels/cut_rows.py [--dry-run].

Logits of 128,256 entries. Peers: sorting, which is what is usually written, and torch.compile of it. Bytes: the logits
once, which is the floor and not what bisection reads (see the module).
"""

import torch
from harness import Case, compiled, device, main

from unsloth.kernels.cut_rows import cut_rows, cut_rows_reference

VOCABULARY = 128_256


def cases(small: bool) -> list[Case]:
    size = 300 if small else VOCABULARY
    reference = compiled(cut_rows_reference)
    result = []
    for rows in (2,) if small else (1, 32, 256):
        logits = torch.randn(rows, size, device=device(), dtype=torch.bfloat16) * 4
        heat = torch.full((rows,), 0.8, device=device())

        def full(value, dtype=torch.float32, rows=rows):
            return torch.full((rows,), value, dtype=dtype, device=device())

        for k, p, m in ((50, 1.0, 0.0), (0, 0.95, 0.0), (50, 0.95, 0.05)):
            given = (logits, heat, full(k, torch.int32), full(p), full(m))
            ops = {"ours": cut_rows, "compile": reference, "sort": cut_rows_reference}
            found = {name: lambda op=op, given=given: op(*given) for name, op in ops.items()}
            name = f"{rows} x {size}, top-k {k}, top-p {p}, min-p {m}"
            result.append(Case("cut_rows", name, found, bytes=logits.nbytes, reads_only=True))
    return result


if __name__ == "__main__":
    main("cut_rows", cases)
