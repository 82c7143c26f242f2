import pytest
import torch
from check_op import assert_close

from unsloth.core.errors import ConfigError
from unsloth.kernels.lora_rows import gate_rows, gate_rows_reference, lora_rows, lora_rows_reference, project_rows


def make(device, rows=5, k=200, sizes=(70, 33, 64), rank=16, adapters=2, dtype=torch.float32):
    width = rank * adapters
    x = torch.randn(rows, k, device=device).to(dtype)
    a = (torch.randn(len(sizes) * width, k, device=device) * k**-0.5).to(dtype)
    b = [torch.randn(size, width, device=device).to(dtype) for size in sizes]
    y = [torch.randn(rows, size, device=device).to(dtype) for size in sizes]
    mask = torch.zeros(rows, adapters, device=device).to(dtype)
    mask[torch.arange(rows), torch.arange(rows) % adapters] = 1
    mask[::4] = 0
    return x, a, b, y, mask


def run(function, x, a, b, y, mask):
    outputs = [t.clone() for t in y]
    function(x, a, b, outputs, mask)
    return outputs


def check(x, a, b, y, mask):
    ours = run(lora_rows, x, a, b, y, mask)
    plain = run(lora_rows_reference, x, a, b, y, mask)
    wide = None if mask is None else mask.double()
    truth = run(lora_rows_reference, x.double(), a.double(), [t.double() for t in b], [t.double() for t in y], wide)
    for ours_i, plain_i, truth_i in zip(ours, plain, truth, strict=True):
        assert_close(ours_i, plain_i, truth_i, "output")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_the_reference(device, dtype, masked):
    *rest, mask = make(device, dtype=dtype)
    check(*rest, mask if masked else None)


@pytest.mark.parametrize(
    ("rows", "k", "sizes", "rank", "adapters"),
    [(1, 64, (16,), 16, 1), (33, 300, (65, 64), 48, 1), (128, 130, (7,), 16, 3), (35, 20, (8200, 70), 16, 1)],
)
def test_shapes(device, rows, k, sizes, rank, adapters):
    check(*make(device, rows, k, sizes, rank, adapters))


@pytest.mark.parametrize(("rows", "k"), [(1, 64), (40, 300), (128, 9000)])
def test_first_product_made_before(device, rows, k):
    x, a, b, y, mask = make(device, rows, k)
    low = project_rows(x, a)
    torch.testing.assert_close(low.sum(0), x @ a.T, rtol=1e-4, atol=1e-4)
    outputs = [t.clone() for t in y]
    lora_rows(x, a, b, outputs, mask, low=low)
    for ours, own in zip(outputs, run(lora_rows, x, a, b, y, mask), strict=True):
        assert torch.equal(ours, own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize(("rows", "rank", "adapters"), [(5, 16, 2), (70, 48, 1)])
def test_gated_unit(device, dtype, activation, rows, rank, adapters):
    x, a, b, y, mask = make(device, rows, sizes=(70, 70), rank=rank, adapters=adapters, dtype=dtype)
    low = project_rows(x, a)
    for own in (mask, None):
        ours = gate_rows(low, b, y, own, activation)
        plain = gate_rows_reference(low, b, y, own, activation)
        wide = [None if own is None else own.double(), activation]
        rounded = low.double().sum(0)[None] if dtype == torch.float32 else low.sum(0)[None].to(dtype).double()
        truth = gate_rows_reference(rounded, [m.double() for m in b], [t.double() for t in y], *wide)
        assert_close(ours, plain, truth, "h", terms=rank * adapters)


def test_columns_of_wider_tensors_and_many_rows(device):
    x, a, b, y, mask = make(device)
    wide = torch.cat([x, x], 1)[:, :200]
    outputs = torch.cat(y, 1)
    parts = list(outputs.split([70, 33, 64], 1))
    lora_rows(wide, a, b, parts, mask)
    torch.testing.assert_close(outputs, torch.cat(run(lora_rows_reference, x, a, b, y, mask), 1), rtol=1e-5, atol=1e-4)
    check(*make(device, rows=130))


def test_what_does_not_fit(device):
    x, a, b, y, mask = make(device)
    with pytest.raises(ConfigError, match="do not fit"):
        lora_rows(x, a[:-1], b, y, mask)
