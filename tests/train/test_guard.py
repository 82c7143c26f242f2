import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer

from unsloth.train.guard import StepGuard, TooManySkipped
from unsloth.train.memory_error import is_out_of_memory

NAN = float("nan")


class Scaler(torch.amp.GradScaler):
    """A loss scaler on the CPU with a scale of our choosing."""

    def __init__(self, scale):
        super().__init__("cpu", init_scale=scale, growth_interval=10**6)


def guarded(scaler=None, limit=3):
    Accelerator(cpu=True)
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = AcceleratedOptimizer(torch.optim.SGD([parameter], lr=1.0), scaler=scaler)
    guard = StepGuard(limit)
    guard.attach(optimizer)
    return parameter, optimizer, guard


def step(parameter, optimizer, guard, gradient, scaler=None):
    loss = (parameter * gradient).sum()
    (scaler.scale(loss) if scaler else loss).backward()
    if scaler:
        scaler.unscale_(optimizer.optimizer)
    guard.judge(parameter.grad.norm(), scaler, 1)
    optimizer.step()
    optimizer.zero_grad()


def test_a_step_runs_if_and_only_if_the_norm_is_finite():
    parameter, optimizer, guard = guarded()
    step(parameter, optimizer, guard, 1.0)
    assert parameter.tolist() == [0.0] * 3
    assert not optimizer.step_was_skipped
    step(parameter, optimizer, guard, NAN)
    assert parameter.tolist() == [0.0] * 3
    assert optimizer.step_was_skipped
    step(parameter, optimizer, guard, 2.0)
    assert parameter.tolist() == [-2.0] * 3
    assert not optimizer.step_was_skipped
    assert (guard.skipped, guard.in_a_row) == (1, 0)


def test_the_limit_counts_steps_in_a_row():
    parameter, optimizer, guard = guarded(limit=2)
    for gradient in (NAN, 1.0, NAN):
        step(parameter, optimizer, guard, gradient)
    with pytest.raises(TooManySkipped):
        step(parameter, optimizer, guard, float("inf"))


def test_a_loss_scaler_finds_its_scale_and_real_failures_still_end_the_run():
    scaler = Scaler(2.0**8)
    parameter, optimizer, guard = guarded(scaler)
    scales = []
    with pytest.raises(TooManySkipped):
        for _ in range(30):
            step(parameter, optimizer, guard, NAN, scaler)
            scales.append(scaler.get_scale())
    assert parameter.tolist() == [1.0] * 3
    assert scales[:8] == [2.0**i for i in range(7, -1, -1)]
    assert guard.in_a_row == 3


def test_a_new_guard_replaces_the_old_one():
    parameter, optimizer, old = guarded()
    new = StepGuard(3)
    new.attach(optimizer)
    step(parameter, optimizer, new, NAN)
    assert parameter.tolist() == [1.0] * 3
    assert (old.skipped, new.skipped) == (0, 1)


def test_out_of_memory_is_recognized():
    for error in (
        torch.OutOfMemoryError("x"),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
    ):
        assert is_out_of_memory(error)
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("out of memory"))
