import pytest
import torch
from check_op import ODD_SHAPES, check_op, layouts

from unsloth.core.errors import ConfigError
from unsloth.kernels.glu import glu_backward, glu_forward
from unsloth.kernels.swiglu import swiglu, swiglu_reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def pair(shape, device, dtype=torch.float32, scale=3.0):
    return [(torch.randn(shape, device=device) * scale).to(dtype).requires_grad_() for _ in range(2)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*ODD_SHAPES, (2, 3, 2100)])
def test_output_and_gradients(device, shape, dtype):
    check_op(swiglu, swiglu_reference, *pair(shape, device, dtype), names=("gate", "up"))


def test_halves_of_a_fused_projection(device):
    fused = torch.randn(2, 3, 74, device=device, requires_grad=True)
    check_op(lambda x: swiglu(*x.chunk(2, -1)), lambda x: swiglu_reference(*x.chunk(2, -1)), fused)


@pytest.mark.parametrize("layout", ["columns of a wider buffer", "every second", "transposed"])
def test_layouts(device, layout):
    gate, up = pair((2, 5, 33), device, torch.float16)
    check_op(swiglu, swiglu_reference, layouts(gate)[layout], up)
    check_op(swiglu, swiglu_reference, gate, layouts(up)[layout])


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16), (3, 0)])
def test_empty(device, shape):
    check_op(swiglu, swiglu_reference, *pair(shape, device))


def test_extreme_gates(device):
    gate = torch.tensor([-1e30, -200.0, -90.0, 0.0, 90.0, 1e30], device=device, requires_grad=True)
    check_op(swiglu, swiglu_reference, gate, torch.ones(6, device=device, requires_grad=True))


def test_backward_in_place_with_recomputed_output(device):
    gate, up = (x.detach() for x in pair((3, 40), device))
    dh = torch.randn(3, 40, device=device)
    dgate, dup = glu_backward(dh, gate, up, "silu")
    h = glu_forward(gate, up, "silu")
    buffers = gate.clone(), up.clone(), dh.clone()
    glu_backward(buffers[2], buffers[0], buffers[1], "silu", dgate=buffers[0], dup=buffers[1], h=buffers[2])
    for got, expected in zip(buffers, (dgate, dup, h), strict=True):
        assert torch.equal(got, expected)
    wide = torch.zeros(3, 50, device=device)
    glu_forward(gate, up, "silu", out=wide[:, :40])
    assert torch.equal(wide[:, :40], h) and not wide[:, 40:].any()


def test_bad_input(device):
    gate, up = pair((3, 8), device)
    with pytest.raises(ConfigError, match="up has the wrong shape"):
        swiglu(gate, up[:, :4])
    with pytest.raises(ConfigError, match="not floating point"):
        swiglu(gate.long(), up)
    with pytest.raises(ConfigError, match="another device"):
        swiglu(gate, up.to("meta"))
    assert swiglu(gate.half(), up).dtype == torch.float32
    assert swiglu(gate.double(), up.double()).dtype == torch.float64
