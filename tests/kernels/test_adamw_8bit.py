import copy

import pytest
import torch
import triton
import triton.language as tl

from unsloth.core.errors import ConfigError
from unsloth.kernels.adamw_8bit import (
    TABLES,
    AdamWStep,
    Moments,
    adamw_8bit,
    adamw_8bit_reference,
    dequantize,
    fill_tables,
    make_tables,
    nearest,
)
from unsloth.kernels.dispatch import interpreting

functional = pytest.importorskip("bitsandbytes.functional")

SHAPES = [(1,), (7, 33), (16, 16), (3, 700), (27000,)]  # more tiles than programs


def codes(device):
    tables = [functional.create_dynamic_map(signed=signed) for signed in (True, False)]
    return torch.stack(tables).to(device, torch.float32)


def fresh(parameter, zero):
    blocks = -(-parameter.numel() // 256)
    indices = [torch.full(parameter.shape, z, dtype=torch.uint8, device=parameter.device) for z in zero]
    return Moments(*indices, *(torch.zeros(blocks, device=parameter.device) for _ in range(2)))


def problem(device, dtype, shapes=SHAPES):
    parameters = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
    zero = [int(table.abs().argmin()) for table in codes(device)]
    return parameters, [fresh(parameter, zero) for parameter in parameters]


def steps(n, **changes):
    return [AdamWStep(**{"learning_rate": 0.01, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1,
                         "step": t + 1, **changes}) for t in range(n)]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_kernel_equals_the_reference(device, dtype):
    parameters, moments = problem(device, dtype)
    expected, expected_moments = copy.deepcopy((parameters, moments))
    for step in steps(3):
        gradients = [torch.randn_like(parameter) for parameter in parameters]
        adamw_8bit(parameters, gradients, moments, codes(device), step)
        for p, g, s in zip(expected, gradients, expected_moments, strict=True):
            adamw_8bit_reference(p, g, s, codes(device), step)
    tolerance = max(torch.finfo(dtype).eps, 1e-6)
    for p, e, s, es in zip(parameters, expected, moments, expected_moments, strict=True):
        assert torch.allclose(p.float(), e.float(), rtol=4 * tolerance, atol=4 * tolerance)
        # a last bit of float32 may tip a value that lies halfway between two numbers of the table
        for ours, theirs in ((s.first, es.first), (s.second, es.second)):
            assert (ours.int() - theirs.int()).abs().max() <= 1
            assert (ours != theirs).float().mean() <= 0.01
        assert torch.allclose(s.first_scale, es.first_scale, rtol=1e-5)
        assert torch.allclose(s.second_scale, es.second_scale, rtol=1e-5)


@pytest.mark.parametrize("fast", [True, False])
def test_it_follows_adamw(device, fast):
    """With one block whose values are alike, 8 bits lose little, so the weights stay near those of exact AdamW."""
    parameters, moments = problem(device, torch.float32, [(16, 64)])
    exact = [torch.nn.Parameter(parameters[0].clone())]
    adamw = torch.optim.AdamW(exact, lr=0.01, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    start = parameters[0].clone()
    for step in steps(10):
        exact[0].grad = torch.sign(start) * (1 + 0.1 * torch.rand_like(start))
        adamw_8bit(parameters, [exact[0].grad], moments, codes(device), step, fast=fast)
        adamw.step()
    moved = (exact[0] - start).norm()
    assert (parameters[0] - exact[0]).norm() < 0.02 * moved


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_the_states_are_those_of_bitsandbytes(device, decay):
    parameters, moments = problem(device, torch.float32, [(64, 96)])
    theirs = torch.nn.Parameter(parameters[0].clone())
    from bitsandbytes.optim import AdamW8bit

    optimizer = AdamW8bit([theirs], lr=0.01, weight_decay=decay, min_8bit_size=1)
    for step in steps(4, weight_decay=decay):
        theirs.grad = torch.randn_like(theirs)
        adamw_8bit(parameters, [theirs.grad.clone()], moments, codes(device), step)
        optimizer.step()
    state = optimizer.state[theirs]
    for ours, scale, name, table in (
        (moments[0].first, moments[0].first_scale, "1", codes(device)[0]),
        (moments[0].second, moments[0].second_scale, "2", codes(device)[1]),
    ):
        expected = dequantize(state["state" + name], state["absmax" + name], table)
        assert (dequantize(ours, scale, table) - expected).norm() <= 0.02 * expected.norm()
    # On a GPU it decays what the step has moved, the paper and torch what was there before: lr * decay of the four
    # steps of lr or less lies between the two. And they round some values to different neighbours in the table.
    tolerance = 1e-5 + 4 * 0.01 * 0.01 * decay
    assert ((parameters[0] - theirs).abs() > tolerance).float().mean() <= 0.05


def test_what_cannot_be_updated_together_is_refused(device):
    parameters, moments = problem(device, torch.float32, [(4, 4)])
    with pytest.raises(ConfigError, match="equal shapes"):
        adamw_8bit(parameters, [torch.zeros(4, 5, device=device)], moments, codes(device), steps(1)[0])
    with pytest.raises(ConfigError, match="not contiguous"):
        adamw_8bit([parameters[0].T], [torch.zeros(4, 4, device=device)], moments, codes(device), steps(1)[0])
    adamw_8bit([], [], [], codes(device), steps(1)[0])


@pytest.mark.parametrize("fast", [True, False])
def test_torch_knows_that_the_parameters_have_changed(device, fast):
    parameters, moments = problem(device, torch.float32)
    before = [parameter._version for parameter in parameters]
    gradients = [torch.randn_like(parameter) for parameter in parameters]
    adamw_8bit(parameters, gradients, moments, codes(device), steps(1)[0], fast=fast)
    assert all(parameter._version > version for parameter, version in zip(parameters, before, strict=True))


@triton.jit
def nearest_kernel(
    share, tables, out, SIGNED: tl.constexpr, SIZE: tl.constexpr, PLAIN: tl.constexpr, BLOCK: tl.constexpr
):
    """The indices of BLOCK shares."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tables = fill_tables(tables, SIZE, 128, PLAIN)
    tl.store(out + at, nearest(tl.load(share + at), tables, SIGNED, PLAIN))


@pytest.mark.parametrize("table", [0, 1])
def test_every_share_finds_the_nearest_number_of_the_table(device, table):
    code = codes(device)
    mids = (code[table, 1:] + code[table, :-1]) / 2
    edges = torch.cat([mids, 2.0 ** -torch.arange(40.0, device=device)]).clamp(-1, 1)
    below, above = (torch.nextafter(edges, torch.full_like(edges, x)).clamp(-1, 1) for x in (-2.0, 2.0))
    random = torch.rand(4096 - 4 * len(edges), device=device) * 2 - 1
    share = torch.cat([edges, -edges, below, above, random])
    share = share.abs() if table else share
    out = torch.empty(4096, dtype=torch.int32, device=device)
    nearest_kernel[(4,)](
        share, make_tables(code), out, SIGNED=not table, SIZE=TABLES, PLAIN=interpreting(), BLOCK=1024, num_warps=4
    )
    assert torch.equal(out.long(), torch.bucketize(share, mids))


def test_tables_that_are_too_fine_are_refused():
    fine = torch.linspace(-1, 1, 256).repeat(2, 1)
    fine[0, 128:] = 0.5 + 1e-6 * torch.arange(128)
    with pytest.raises(ConfigError, match="finer"):
        make_tables(fine)


def test_not_a_number_stays_inside_the_table(device):
    parameters, moments = problem(device, torch.float32, [(300,)])
    adamw_8bit(parameters, [torch.full((300,), float("nan"), device=device)], moments, codes(device), steps(1)[0])
    assert parameters[0].isnan().all()
