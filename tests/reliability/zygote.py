"""Training runs in processes of their own that can be killed, without paying for the imports each time.

As a script: imports the library once, then forks a child for each line of JSON on standard input. ``{"start": SPEC}``
answers with the child's process id, ``{"wait": PID}`` with its exit status (negative: the signal that killed it).
The child runs the training and ends as a script of its own would.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import shutil
import sys
import time
from pathlib import Path

import safetensors.torch
import torch
from transformers import TrainerCallback

from unsloth import FastLanguageModel, SFTConfig, SFTTrainer
from unsloth.core import artifact
from unsloth.core.errors import UnslothError

DEFAULTS = {
    "max_steps": 8,
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 2,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "per_device_train_batch_size": 2,
    "optim": "adamw_torch",
    "seed": 11,
    "use_cpu": True,
    "disable_tqdm": True,
    "report_to": "none",
}


def rows(count: int = 10, first: int = 0) -> list[dict]:
    """Rows of text of different lengths."""
    return [{"text": f"{i}: " + "well " * (1 + i % 4)} for i in range(first, first + count)]


def build(
    model: str,
    output_dir: str,
    data: list[dict] | None = None,
    adapter: dict | None = None,
    precision: str = "load_in_16bit",
    callbacks: list | None = None,
    eval_data: list[dict] | None = None,
    classes: tuple[type, type] = (SFTTrainer, SFTConfig),
    **changes,
) -> SFTTrainer:
    """A trainer (``classes``: it and its configuration) of a tiny model, with dropout so that random states matter."""
    loaded, tokenizer = FastLanguageModel.from_pretrained(
        model, max_seq_length=64, dtype=torch.float32, **{precision: True}
    )
    options = {"r": 4, "lora_dropout": 0.1, "use_gradient_checkpointing": False, **(adapter or {})}
    loaded = FastLanguageModel.get_peft_model(loaded, **options)
    trainer, config = classes
    return trainer(
        model=loaded,
        tokenizer=tokenizer,
        train_dataset=rows() if data is None else data,
        eval_dataset=eval_data,
        args=config(output_dir=output_dir, **{**DEFAULTS, **changes}),
        callbacks=callbacks,
    )


def weights(trainer: SFTTrainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


class Slow(TrainerCallback):
    """Sleeps at the start of every step, so that a signal finds the run at work; says so by a file."""

    def __init__(self, seconds: float, marker: Path) -> None:
        self.seconds, self.marker = seconds, marker

    def on_step_begin(self, args, state, *rest, **kwargs) -> None:
        self.marker.with_name(f"in-step-{state.global_step + 1}").touch()
        time.sleep(self.seconds)


def small_disk(folder: Path, size: int) -> None:
    """Put a file system of ``size`` bytes at ``folder``, which only this process sees."""
    library = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if library.unshare(0x10000000 | 0x00020000) != 0:  # CLONE_NEWUSER | CLONE_NEWNS
        raise PermissionError("no namespaces here")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    folder.mkdir(parents=True, exist_ok=True)
    if library.mount(b"none", os.fsencode(folder), b"tmpfs", 0, f"size={size}".encode()) != 0:
        raise PermissionError("no mounts here")


def run_on_a_full_disk(spec: dict) -> None:
    """Train until the disk is full; say what happened in JSON; make room, resume, and finish."""
    spec = dict(spec)
    output, result = Path(spec["output_dir"]), Path(spec.pop("result"))
    result.mkdir(parents=True, exist_ok=True)
    try:
        small_disk(output, spec.pop("disk"))
    except PermissionError as error:
        (result / "report.json").write_text(json.dumps({"unavailable": str(error)}))
        return
    filler = output / "filler"
    try:
        fill(filler, spec.pop("when"), spec)
        error = None
    except UnslothError as raised:
        error = f"{type(raised).__name__}: {raised}"
    report = {"error": error, "left": sorted(path.name for path in output.iterdir())}
    report["problems"] = artifact.verify(output / "checkpoint-2")
    filler.unlink()
    trainer = build(**spec)
    trainer.train(resume_from_checkpoint=True)
    safetensors.torch.save_file(weights(trainer), result / "weights.safetensors")
    (result / "report.json").write_text(json.dumps(report))


def fill(filler: Path, when: str, spec: dict) -> None:
    """Train, and fill the disk before, or in the middle of, the second save."""
    trainer = build(**spec)
    save = trainer.processing_class.save_pretrained

    def write_all() -> None:
        if trainer.state.global_step == 4:
            filler.write_bytes(bytes(shutil.disk_usage(filler.parent).free - 2 * 4096))

    class Before(TrainerCallback):
        def on_step_end(self, *args, **kwargs) -> None:
            write_all()

    def during(*args, **kwargs):
        save(*args, **kwargs)
        write_all()

    if when == "before the save":
        trainer.add_callback(Before())
    else:
        trainer.processing_class.save_pretrained = during
    trainer.train()


def run(spec: dict) -> None:
    """Train as ``spec`` says; at the end leave the weights and the log in the folder ``spec["result"]``."""
    spec = dict(spec)
    result, resume, pause = Path(spec.pop("result")), spec.pop("resume", None), spec.pop("pause", 0)
    result.mkdir(parents=True, exist_ok=True)
    trainer = build(callbacks=[Slow(pause, result / "marker")] if pause else None, **spec)
    trainer.train(resume_from_checkpoint=resume)
    safetensors.torch.save_file(weights(trainer), result / "weights.safetensors")
    (result / "log.json").write_text(json.dumps(trainer.state.log_history))


def answer(value: object) -> None:
    sys.stdout.write(f"{value}\n")
    sys.stdout.flush()


def serve() -> dict | None:
    """Answer requests; returns None at their end, and in a child what it is to run."""
    answer("ready")
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            answer(os.waitstatus_to_exitcode(status))
            continue
        spec = request["start"]
        log = spec.pop("log")
        child = os.fork()
        if child == 0:
            os.setsid()
            target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            nothing = os.open(os.devnull, os.O_RDONLY)
            for number, source in ((0, nothing), (1, target), (2, target)):
                os.dup2(source, number)
            return spec
        answer(child)
    return None


if __name__ == "__main__":
    # Loaded on first use otherwise, in every child anew.
    import bitsandbytes  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401

    SFTTrainer, SFTConfig, FastLanguageModel  # noqa: B018
    gc.collect()
    gc.freeze()  # what is loaded now is not searched again by every collection of every child
    wanted = serve()
    if wanted is not None:
        run_on_a_full_disk(wanted) if "disk" in wanted else run(wanted)
