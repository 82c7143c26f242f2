import pytest
import torch

from unsloth.kernels.rms_norm import add_rms_norm, rms_norm
from unsloth.kernels.side_by_side import side_by_side


def test_results_come_in_order():
    device = torch.device("cpu")
    assert side_by_side([], device) == []
    assert side_by_side([lambda i=i: 2 * i for i in range(4)], device) == [0, 2, 4, 6]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_branches_of_a_graph_give_what_a_sequence_does():
    device = torch.device("cuda")
    x = torch.randn(64, 512, device=device)
    weights = [torch.randn(512, 512, device=device) / 20 for _ in range(3)]

    def compute():
        y = x
        for _ in range(20):  # memory of one round is used again in the next
            y = torch.tanh(sum(side_by_side([lambda w=w, y=y: y @ w + 1 for w in weights], device)))
        return y

    expected, graph = compute(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = compute()
    for _ in range(3):
        graph.replay()
        assert torch.equal(found, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_kernel_launched_early_waits_for_all_branches():
    device = torch.device("cuda")
    x = torch.randn(64, 512, device=device)
    weights = [torch.randn(512, 512, device=device) / 20 for _ in range(3)]
    norm = torch.ones(512, device=device)

    def compute():
        y = x
        for _ in range(20):
            first, second, third = side_by_side([lambda w=w, y=y: y @ w + 1 for w in weights], device)
            y = rms_norm(first, norm) + add_rms_norm(second, third, norm)[0]
        return y

    with torch.no_grad():
        expected, graph = compute(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = compute()
    for _ in range(3):
        graph.replay()
        assert torch.equal(found, expected)
