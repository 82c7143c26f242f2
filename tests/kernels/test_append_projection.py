import pytest
import torch
from check_op import assert_close, layouts

from unsloth.kernels.append_projection import append_projection, append_projection_reference


def check(x, projection, copy=True):
    """Both halves of the result, in a buffer filled with NaN before."""
    rows, features = x.shape
    wide = x.new_full((rows, features + projection.shape[1]), float("nan"))
    kept = x.new_empty(rows, projection.shape[1])
    append_projection(x, projection, wide[:, features:], copy=wide[:, :features] if copy else None, kept=kept)
    assert torch.equal(kept, wide[:, features:])
    plain, truth = (
        append_projection_reference(x, projection),
        append_projection_reference(x.double(), projection.double()),
    )
    if copy:
        assert torch.equal(wide[:, :features], x)
    else:
        assert wide[:, :features].isnan().all()
    assert_close(wide[:, features:], plain[:, features:], truth[:, features:], "projection")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1, 1), (33, 70, 16), (31, 129, 3), (5, 64, 40)])
def test_values(device, dtype, shape):
    m, k, r = shape
    check(torch.randn(m, k, device=device).to(dtype), torch.randn(k, r, device=device).to(dtype))


def test_layouts(device):
    x, p = torch.randn(6, 40, device=device), torch.randn(40, 5, device=device)
    for view in layouts(x).values():
        check(view, p)
    for view in layouts(p).values():
        check(x, view)


def test_without_copy_wide_ranks_and_empty(device):
    x = torch.randn(5, 24, device=device)
    check(x, torch.randn(24, 8, device=device), copy=False)
    check(x, torch.randn(24, 200, device=device))
    check(x, torch.randn(24, 0, device=device))
    check(x[:0], torch.randn(24, 8, device=device))
