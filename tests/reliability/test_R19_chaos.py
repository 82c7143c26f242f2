"""Killed at random moments and resumed each time, a run ends with the weights of the undisturbed one."""

import json
import os
import random
import signal
import time

import pytest
import safetensors.torch


def outcome(folder):
    """Weights and losses at the end of a run."""
    log = json.loads((folder / "result" / "log.json").read_text())
    losses = [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]
    return safetensors.torch.load_file(folder / "result" / "weights.safetensors"), losses


@pytest.mark.timeout(7200)
def test_chaos(zygote, tiny, tmp_path, assert_equal, soak):
    """5 kills; or 200 with ``--soak``, of a run of 300 steps, begun again as often as it gets to its end."""
    kills, steps, longest = (200, 300, 3.0) if soak else (5, 20, 1.0)
    spec = {"model": str(tiny()), "max_steps": steps, "save_steps": 2, "save_total_limit": 2}
    clean = zygote.start(tmp_path / "clean", output_dir=str(tmp_path / "clean" / "out"), **spec)
    assert clean.wait() == 0, clean.log
    weights, losses = outcome(tmp_path / "clean")
    chance = random.Random(7)
    killed, ended = 0, 0
    while killed < kills or ended == 0:
        folder = tmp_path / f"chaos-{ended}"
        process = zygote.start(folder, output_dir=str(folder / "out"), resume=True, **spec)
        if killed < kills:
            time.sleep(chance.uniform(0.05, longest))
            os.kill(process.pid, signal.SIGKILL)
        status = process.wait()
        assert status in (0, -signal.SIGKILL), process.log
        killed += status != 0
        if status == 0:
            found_weights, found_losses = outcome(folder)
            assert_equal(found_weights, weights)
            assert found_losses == losses
            ended += 1
    assert killed == kills
