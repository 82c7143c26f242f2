import pytest
import torch
from check_op import ODD_SHAPES, check_op

from unsloth.core.errors import ConfigError
from unsloth.kernels.geglu import geglu, geglu_reference


def ours(gate, up, tanh):
    return geglu(gate, up, tanh=tanh)


@pytest.mark.parametrize("tanh", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [*ODD_SHAPES, (2, 3, 2100)])
def test_output_and_gradients(device, shape, dtype, tanh):
    gate, up = ((torch.randn(shape, device=device) * 3).to(dtype).requires_grad_() for _ in range(2))
    check_op(ours, geglu_reference, gate, up, tanh, names=("gate", "up"))


@pytest.mark.parametrize("tanh", [True, False])
def test_extreme_gates(device, tanh):
    gate = torch.tensor([-1e10, -200.0, -9.0, 0.0, 9.0, 1e10], device=device, requires_grad=True)
    check_op(ours, geglu_reference, gate, torch.ones(6, device=device, requires_grad=True), tanh)


def test_empty_and_bad_input(device):
    empty = torch.randn(0, 16, device=device, requires_grad=True)
    check_op(ours, geglu_reference, empty, empty.detach().requires_grad_(), True)
    with pytest.raises(ConfigError, match="up has the wrong shape"):
        geglu(empty, torch.randn(0, 8, device=device))
