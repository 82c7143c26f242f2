"""Killed at random moments and resumed each time, a run ends with the weights of the undisturbed one."""

import json
import os
import random
import signal
import time

import safetensors.torch

SPEC = {"max_steps": 30, "save_steps": 2, "save_total_limit": 2}


def test_chaos(zygote, tiny, tmp_path, assert_equal, soak):
    """5 kills, or 200 with ``--soak``; the last run is left alone."""
    kills = 200 if soak else 5
    spec = {"model": str(tiny()), **SPEC}
    if soak:
        spec |= {"max_steps": 1200, "pause": 0.02}
    clean = zygote.start(tmp_path / "clean", output_dir=str(tmp_path / "clean" / "out"), **spec)
    assert clean.wait() == 0, clean.log
    chance = random.Random(7)
    survived = 0
    while survived < kills:
        process = zygote.start(tmp_path / "chaos", output_dir=str(tmp_path / "chaos" / "out"), resume=True, **spec)
        time.sleep(chance.uniform(0.1, 2.0) if soak else chance.uniform(0.3, 1.0))
        os.kill(process.pid, signal.SIGKILL)
        survived += process.wait() == -signal.SIGKILL
        if (tmp_path / "chaos" / "result" / "log.json").exists():
            break
    process = zygote.start(tmp_path / "chaos", output_dir=str(tmp_path / "chaos" / "out"), resume=True, **spec)
    assert process.wait() == 0, process.log
    results = [
        safetensors.torch.load_file(tmp_path / name / "result" / "weights.safetensors") for name in ("chaos", "clean")
    ]
    assert_equal(*results)
    logs = [json.loads((tmp_path / name / "result" / "log.json").read_text()) for name in ("chaos", "clean")]
    losses = [[(entry["step"], entry["loss"]) for entry in log if "loss" in entry] for log in logs]
    assert losses[0] == losses[1]
    assert survived == kills
