"""Adapters of rank 32 added to the projections of a decoding step: python bench/kernels/lora_rows.py [--dry-run]."""

import torch
from harness import Case, compiled, device, main

from unsloth.kernels.lora_rows import lora_rows, lora_rows_reference

GROUPS = {"q/k/v": ((4096, 1024, 1024), 4096), "o": ((4096,), 4096), "gate/up": ((14336, 14336), 4096)}
GROUPS["down"] = ((4096,), 14336)
RANK = 32


def cases(small: bool) -> list[Case]:
    result = []
    reference = compiled(lora_rows_reference)
    for name, (outs, k) in {"small": ((16, 24), 128)}.items() if small else GROUPS.items():
        for rows in (1, 32, 128):

            def make(*shape):
                return torch.randn(*shape, device=device(), dtype=torch.bfloat16)

            x, a = make(rows, k), make(RANK * len(outs), k)
            b, y = [make(n, RANK) for n in outs], [make(rows, n) for n in outs]
            found = {
                "ours": lambda x=x, a=a, b=b, y=y: lora_rows(x, a, b, y),
                "compile": lambda x=x, a=a, b=b, y=y: reference(x, a, b, y),
                "reference": lambda x=x, a=a, b=b, y=y: lora_rows_reference(x, a, b, y),
            }
            size = sum(t.nbytes for t in (x, a, *b, *y, *y))
            result.append(Case("lora_rows", f"{name}, {rows} rows", found, bytes=size))
    return result


if __name__ == "__main__":
    main("lora_rows", cases)
