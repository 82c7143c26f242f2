"""Training runs in processes of their own that can be killed, without paying for the imports each time.

As a script: imports the library once, then forks a child for each line of JSON on standard input. ``{"start": SPEC}``
answers with the child's process id, ``{"wait": PID}`` with its exit status (negative: the signal that killed it).
The child runs the training and ends as a script of its own would.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from pathlib import Path

import safetensors.torch
import torch
from transformers import TrainerCallback

from unsloth import FastLanguageModel, SFTConfig, SFTTrainer

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
    full: bool = False,
    callbacks: list | None = None,
    eval_data: list[dict] | None = None,
    **changes,
) -> SFTTrainer:
    """A trainer of a tiny model, with dropout so that the random generators matter."""
    precision = {"full_finetuning": True} if full else {"load_in_16bit": True}
    loaded, tokenizer = FastLanguageModel.from_pretrained(model, max_seq_length=64, dtype=torch.float32, **precision)
    options = {"r": 4, "lora_dropout": 0.1, "use_gradient_checkpointing": False, **(adapter or {})}
    loaded = FastLanguageModel.get_peft_model(loaded, **options)
    return SFTTrainer(
        model=loaded,
        tokenizer=tokenizer,
        train_dataset=rows() if data is None else data,
        eval_dataset=eval_data,
        args=SFTConfig(output_dir=output_dir, **{**DEFAULTS, **changes}),
        callbacks=callbacks,
    )


def weights(trainer: SFTTrainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


class Slow(TrainerCallback):
    """Sleeps in every step, so that a signal finds the run at work."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_step_begin(self, *args, **kwargs) -> None:
        time.sleep(self.seconds)


def run(spec: dict) -> None:
    """Train as ``spec`` says; at the end leave the weights and the log in the folder ``spec["result"]``."""
    spec = dict(spec)
    result, resume, pause = Path(spec.pop("result")), spec.pop("resume", None), spec.pop("pause", 0)
    trainer = build(callbacks=[Slow(pause)] if pause else None, **spec)
    trainer.train(resume_from_checkpoint=resume)
    result.mkdir(parents=True, exist_ok=True)
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
        run(wanted)
