"""Memory at a fixed address."""

import pytest
import torch

from unsloth.memory.mapped import MappedMemory


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA's virtual memory needs a GPU")
def test_memory_comes_back_at_its_address():
    memory = MappedMemory(5 << 20, torch.device("cuda", 0))
    free = []
    for _ in range(3):
        memory.take()
        whole = memory.tensor()
        assert whole.data_ptr() == memory.address and whole.numel() >= 5 << 20
        whole.fill_(7)
        assert int(whole.sum(dtype=torch.int64)) == 7 * whole.numel()
        memory.release()
        free.append(torch.cuda.mem_get_info()[0])
    assert free[1] == free[2]  # the first time, kernels are loaded and torch takes memory of its own


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_without_a_gpu_it_says_so():
    with pytest.raises((RuntimeError, AssertionError)):
        MappedMemory(1, torch.device("cuda", 0))
