"""The instructions of the fragment kernel, carried out one by one for the 32 lanes of a warp.

Triton's interpreter cannot run assembly. What the handful of instructions do is written down here after the PTX
manual, fragment layouts included, and the kernel's text is run on it.
"""

import re

import numpy as np
import pytest
import torch

from unsloth.kernels import nf4_fragments
from unsloth.kernels.nf4 import NF4_CODE

LANES = np.arange(32)
TABLE, X = 1024, 2**20  # addresses of the table in shared memory, and of x in global memory


def bits(values: torch.Tensor) -> np.ndarray:
    """bfloat16 values as uint16."""
    return values.bfloat16().view(torch.int16).numpy().view(np.uint16)


def floats(halves: np.ndarray) -> np.ndarray:
    """uint16 bit patterns of bfloat16 values as float64."""
    return (halves.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def pairs(registers: np.ndarray) -> np.ndarray:
    """The two values in each 32-bit register, lower half first, along a new last dimension."""
    return np.stack((floats((registers & 0xFFFF).astype(np.uint16)), floats((registers >> 16).astype(np.uint16))), -1)


def byte_permute(a: np.ndarray, b: int, selector: int) -> np.ndarray:
    source = [(a >> (8 * i)) & 255 for i in range(4)] + [np.full_like(a, (b >> (8 * i)) & 255) for i in range(4)]
    return sum(source[(selector >> (4 * i)) & 7] << (8 * i) for i in range(4))


def fragment_product(a: list, b: list, c: list) -> list:
    """mma.m16n8k16: registers by lane, 4 of A, 2 of B, 4 of C."""
    g, t = LANES >> 2, LANES & 3
    left, right, sums = np.zeros((16, 16)), np.zeros((16, 8)), np.zeros((16, 8))
    for i, register in enumerate(a):
        for half in range(2):
            left[g + 8 * (i % 2), 2 * t + half + 8 * (i // 2)] = pairs(register)[:, half]
    for i, register in enumerate(b):
        for half in range(2):
            right[2 * t + half + 8 * i, g] = pairs(register)[:, half]
    for i, value in enumerate(c):
        sums[g + 8 * (i // 2), 2 * t + i % 2] = value
    sums = sums + left @ right
    return [sums[g + 8 * (i // 2), 2 * t + i % 2] for i in range(4)]


class Warp:
    """Registers of 32 lanes by name, shared and global memory as bytes."""

    def __init__(self, operands: dict, shared: np.ndarray, memory: np.ndarray) -> None:
        self.registers, self.shared, self.memory = dict(operands), shared, memory

    def read(self, memory: np.ndarray, address: np.ndarray, base: int) -> np.ndarray:
        at = address - base
        return sum(memory[at + i].astype(np.int64) << (8 * i) for i in range(4))

    def value(self, name: str):
        return int(name) if re.fullmatch(r"-?\d+", name) else self.registers[name]

    def run(self, text: str) -> None:
        for line in text.splitlines():
            line = line.strip().rstrip(";")
            if line and line[0] not in ".{}":
                self.step(*line.split(None, 1))

    def step(self, op: str, rest: str) -> None:
        r, names = self.registers, re.findall(r"\$?\w+", rest)
        if op == "mov.f32":
            r[names[0]] = np.zeros(32)
        elif op == "mov.b64":
            r[names[0]], r[names[1]] = r[names[2]] & 0xFFFFFFFF, (r[names[2]] >> 32) & 0xFFFFFFFF
        elif op == "prmt.b32":
            r[names[0]] = byte_permute(r[names[1]], self.value(names[2]), self.value(names[3]))
        elif op == "mad.lo.u32":
            r[names[0]] = r[names[1]] * self.value(names[2]) + self.value(names[3])
        elif op == "ld.shared.b32":
            r[names[0]] = self.read(self.shared, r[names[1]], TABLE)
        elif op == "ld.global.nc.v4.b32":
            first = r[names[4]] + (int(names[5]) if len(names) > 5 else 0)
            for i in range(4):
                r[names[i]] = self.read(self.memory, first + 4 * i, X)
        elif op.startswith("mma.sync.aligned.m16n8k16.row.col"):
            found = fragment_product(*([r[n] for n in part] for part in (names[4:8], names[8:10], names[10:14])))
            r.update(zip(names[:4], found, strict=True))
        else:
            raise AssertionError(f"unknown instruction {op}")


@pytest.mark.parametrize("columns", [1, 2, 4])
def test_one_block_by_hand(columns):
    rows, block = 8 * columns, 64
    packed = torch.randint(0, 256, (16, block // 2), dtype=torch.uint8)
    x = torch.randn(rows, block).bfloat16()
    code = torch.tensor(NF4_CODE).bfloat16()
    weight = code[torch.stack((packed >> 4, packed & 15), -1).reshape(16, block).long()]
    pair = bits(code)[np.arange(256) >> 4].astype(np.uint32) | bits(code)[np.arange(256) & 15].astype(np.uint32) << 16
    shared = np.repeat(pair[:, None], 32, 1).reshape(-1).view(np.uint8)
    g, t = LANES >> 2, LANES & 3
    words = np.ascontiguousarray(packed.numpy()).view(np.int64)  # [16, 4], what lane 4 g + t loads at [g, t]
    first = 4 * columns
    operands = {f"${first}": words[g, t], f"${first + 1}": words[g + 8, t], f"${first + 2}": TABLE + 4 * LANES}
    for tile in range(columns):
        operands[f"${first + 3 + tile}"] = X + ((8 * tile + g) * block + 16 * t) * 2
    warp = Warp(operands, shared, np.ascontiguousarray(bits(x)).view(np.uint8).reshape(-1))
    warp.run(nf4_fragments.MULTIPLY_BF16.value[columns])
    expected = weight.double() @ x.double().T
    for tile in range(columns):
        for i in range(4):
            want = expected[g + 8 * (i // 2), 8 * tile + 2 * t + i % 2].numpy()
            np.testing.assert_allclose(warp.registers[f"${4 * tile + i}"], want, atol=1e-9)
