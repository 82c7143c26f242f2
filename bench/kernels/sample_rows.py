"""A token and its log-probabilities for every row of logits: python bench/kernels/sample_rows.py [--dry-run].

Logits of 128,256 entries. Peers: torch.compile of the same draw, and what is usually written: softmax, multinomial, and
log-softmax of the raw logits. Bytes: the logits once, or twice where adjusted ones stand beside the raw.
"""

import torch
from harness import Case, compiled, device, main

from unsloth.kernels.sample_rows import sample_rows, sample_rows_reference

VOCABULARY = 128_256


def usual(raw, adjusted, temperature, bound, keys):
    """Softmax, multinomial, log-probabilities of the token, as most engines write it."""
    z = adjusted.float() / temperature[:, None]
    if bound is not None:
        z = z.masked_fill(z < bound[:, None], float("-inf"))
    token = torch.multinomial(z.softmax(-1), 1)
    return token, z.log_softmax(-1).gather(1, token), raw.float().log_softmax(-1).gather(1, token)


def cases(small: bool) -> list[Case]:
    size = 300 if small else VOCABULARY
    reference = compiled(sample_rows_reference)
    result = []
    for rows in (2,) if small else (1, 32, 256):
        raw, other = (torch.randn(rows, size, device=device(), dtype=torch.bfloat16) * 4 for _ in range(2))
        heat = torch.full((rows,), 0.8, device=device())
        bound = torch.full((rows,), -2.0, device=device())
        keys = torch.randint(-(2**31), 2**31 - 1, (2, rows), device=device(), dtype=torch.int32)
        for adjusted, limit, what in ((raw, None, ""), (other, bound, ", adjusted, bound")):
            given = (raw, adjusted, heat, limit, keys)
            ops = {"ours": sample_rows, "compile": reference, "softmax + multinomial": usual}
            found = {name: lambda op=op, given=given: op(*given) for name, op in ops.items()}
            read = raw.nbytes * (1 if adjusted is raw else 2)
            case = Case("sample_rows", f"{rows} x {size}{what}", found, bytes=read, bar=0.85, reads_only=True)
            result.append(case)
    return result


if __name__ == "__main__":
    main("sample_rows", cases)
