import torch

from unsloth.train.allocations import Allocations


def test_the_peak_is_what_exists_at_once():
    before = torch.ones(1000)
    counted = Allocations(lambda tensor: "large" if tensor.numel() > 1000 else "small")
    counted.exclude([before])
    with counted:
        kept = torch.empty(2000)  # 8,000 bytes
        for _ in range(3):
            before + 1  # 4,000 bytes, given back before the next
        view = before.view(10, 100)  # no memory of its own
        del kept
        late = torch.empty(500)
    assert counted.peak() == {"large": 8000, "small": 4000}
    assert view.numel() == 1000 and late.numel() == 500


def test_a_tensor_can_be_named_afterwards():
    counted = Allocations(lambda tensor: "unknown")
    with counted:
        first, second = torch.empty(10), torch.empty(20)
    counted.relabel(first, "gradient")
    assert counted.peak() == {"gradient": 40, "unknown": 80}
    assert second.numel() == 20
