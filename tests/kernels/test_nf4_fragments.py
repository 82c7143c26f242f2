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
                guard, line = line.split(None, 1) if line[0] == "@" else ("", line)
                before = dict(self.registers)
                self.step(*line.split(None, 1))
                if guard:  # lanes whose predicate is false keep what they had
                    for name, value in self.registers.items():
                        if name in before and value is not before[name]:
                            self.registers[name] = np.where(self.registers[guard[1:]], value, before[name])

    def step(self, op: str, rest: str) -> None:  # noqa: C901  one branch an instruction
        r, names = self.registers, re.findall(r"\$?\w+", rest)
        if op == "mov.f32":
            r[names[0]] = np.zeros(32)
        elif op == "mov.b32":
            r[names[0]] = np.full(32, int(names[1]))
        elif op == "mov.b64":
            r[names[0]], r[names[1]] = r[names[2]] & 0xFFFFFFFF, (r[names[2]] >> 32) & 0xFFFFFFFF
        elif op == "setp.ne.u32":
            r[names[0]] = r[names[1]] != self.value(names[2])
        elif op == "selp.b32":
            r[names[0]] = np.where(r[names[3]], r[names[1]], self.value(names[2]))
        elif op == "prmt.b32":
            r[names[0]] = byte_permute(r[names[1]], self.value(names[2]), self.value(names[3]))
        elif op == "mad.lo.u32":
            r[names[0]] = r[names[1]] * self.value(names[2]) + self.value(names[3])
        elif op == "ld.shared.b32":
            r[names[0]] = self.read(self.shared, r[names[1]], TABLE)
        elif op == "ld.global.nc.b32":
            r[names[0]] = self.read(self.memory, r[names[1]] + int(names[2]), X)
        elif op == "ld.global.nc.v4.b32":
            for i in range(4):
                r[names[i]] = self.read(self.memory, r[names[4]] + int(names[5]) + 4 * i, X)
        elif op.startswith("mma.sync.aligned.m16n8k16.row.col"):
            found = fragment_product(*([r[n] for n in part] for part in (names[4:8], names[8:10], names[10:14])))
            r.update(zip(names[:4], found, strict=True))
        else:
            raise AssertionError(f"unknown instruction {op}")


@pytest.mark.parametrize(
    ("rows", "few"), [(1, True), (3, True), (4, True), (1, False), (5, False), (8, False), (13, False)]
)
def test_a_pair_of_blocks_by_hand(rows, few):
    columns, width = -(-rows // 8), 128
    packed = torch.randint(0, 256, (16, width // 2), dtype=torch.uint8)
    x = torch.randn(rows, width).bfloat16()
    code = torch.tensor(NF4_CODE).bfloat16()
    weight = code[torch.stack((packed >> 4, packed & 15), -1).reshape(16, width).long()].double()
    pair = bits(code)[np.arange(256) >> 4].astype(np.uint32) | bits(code)[np.arange(256) & 15].astype(np.uint32) << 16
    shared = np.repeat(pair[:, None], 32, 1).reshape(-1).view(np.uint8)
    g, t = LANES >> 2, LANES & 3
    words = np.ascontiguousarray(packed.numpy()).view(np.int64)  # [16, 8]: lane 4 g + t loads 2 t and 2 t + 1 of row g
    first = 4 if few else 8 * columns
    operands = {f"${first + i}": words[g + 8 * (i // 2), 2 * t + i % 2] for i in range(4)}
    operands |= {f"${first + 4}": TABLE + 4 * LANES, f"${first + 5}": t >> 1}
    for column in range(columns):
        row = (8 * column + g) >> few
        operands[f"${first + 6 + 2 * column}"] = X + (np.minimum(row, rows - 1) * width + 32 * t) * 2
        exists = (row < rows) & ((g & 1) == (t >> 1)) if few else row < rows
        operands[f"${first + 7 + 2 * column}"] = exists.astype(np.int64)
    warp = Warp(operands, shared, np.ascontiguousarray(bits(x)).view(np.uint8).reshape(-1))
    warp.run(nf4_fragments.MULTIPLY_BF16.value[0 if few else columns])
    blocks = [slice(0, 64), slice(64, 128)]
    for part, values in enumerate(blocks if few else [slice(0, 128), blocks[1]]):
        expected = weight[:, values] @ x.double()[:, values].T
        for column in range(columns):
            for i in (part, part + 2) if few else range(4):
                batch = t if few else 8 * column + 2 * t + i % 2
                want = expected[g + 8 * (i // 2), np.minimum(batch, rows - 1)].numpy()
                got = warp.registers[f"${i if few else 8 * column + 4 * part + i}"]
                np.testing.assert_allclose(got[batch < rows], want[batch < rows], atol=1e-9)


def test_the_side_path_by_hand():
    b, t_values = torch.randn(16, 16).bfloat16(), torch.randn(8, 16).bfloat16()
    g, t = LANES >> 2, LANES & 3
    halves = bits(t_values).astype(np.int64)
    operands = {"$4": X + (g * 16 + 2 * t) * 2, "$5": X + ((g + 8) * 16 + 2 * t) * 2}
    operands |= {f"${6 + i}": halves[g, 8 * i + 2 * t] | halves[g, 8 * i + 2 * t + 1] << 16 for i in range(2)}
    warp = Warp(operands, np.zeros(4, np.uint8), np.ascontiguousarray(bits(b)).view(np.uint8).reshape(-1))
    warp.run(nf4_fragments.ADD_SIDE_BF16.value)
    expected = (b.double() @ t_values.double().T).numpy()
    for i in range(4):
        np.testing.assert_allclose(warp.registers[f"${i}"], expected[g + 8 * (i // 2), 2 * t + i % 2], atol=1e-9)
