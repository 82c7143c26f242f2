import pytest
import torch
from check_op import check_op

from unsloth.kernels.adapter_products import adapter_products, adapter_products_reference


def flat(op, outs, ranks, scales):
    """dA and every dB as one tuple."""

    def run(*tensors):
        da, db = op(*tensors, outs, ranks, scales)
        return da, *db

    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rows", "features", "outs", "ranks"),
    [
        (1, 1, (1,), (1,)),
        (70, 129, (40,), (16,)),
        (33, 40, (24, 130), (3, 5)),
        (200, 136, (136, 8, 16), (8, 4, 6)),
        (9, 16, (8, 8, 8, 8), (2, 2, 2, 2)),
        (9, 16, (8, 8), (64, 100)),
    ],
)
def test_values(device, dtype, rows, features, outs, ranks):
    scales = [0.5 * (i + 1) for i in range(len(outs))]
    shapes = [(rows, features), (rows, sum(ranks) + 3), (rows, sum(outs)), (rows, sum(ranks) + 3)]
    tensors = [torch.randn(*s, device=device).to(dtype) for s in shapes]
    check_op(
        flat(adapter_products, outs, ranks, scales), flat(adapter_products_reference, outs, ranks, scales), *tensors
    )


def test_dA_of_other_linears(device):
    x, p, g, t = (torch.randn(70, n, device=device).bfloat16() for n in (40, 24, 33, 16))
    ops = [
        lambda *tensors, op=op: (lambda da, db: (da, *db))(*op(*tensors, (33,), (5,), (0.5,), rank_a=20))
        for op in (adapter_products, adapter_products_reference)
    ]
    assert ops[0](x, p, g, t)[0].shape == (20, 40)
    check_op(*ops, x, p, g, t)


def test_columns_of_wider_buffers_and_other_strides(device):
    wide = torch.randn(40, 100, device=device).bfloat16()
    x, p, g, t = wide[:, :24], wide[:, 24:32], wide[:, 32:56], wide[:, 60:68]
    ops = [flat(op, (16, 8), (4, 4), (1.0, 2.0)) for op in (adapter_products, adapter_products_reference)]
    check_op(*ops, x, p, g, t)
    check_op(*ops, x.t().contiguous().t(), p, g, t.t().contiguous().t())


def test_no_rows(device):
    nothing = torch.empty(0, 8, device=device, dtype=torch.bfloat16)
    da, db = adapter_products(nothing, nothing, nothing, nothing, (8,), (8,), (1.0,))
    assert da.shape == db[0].shape == (8, 8) and not da.any() and not db[0].any()
