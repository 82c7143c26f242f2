"""A model with an adapter, and exports that are killed on the way: shared by the tests of M07."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import torch

from unsloth import FastLanguageModel
from unsloth.core import artifact


def adapted(folder: Path) -> tuple:
    """A model in four bits with an adapter that is not zero, and its tokenizer."""
    loaded, tokenizer = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=64, dtype=torch.float32, load_in_4bit=True
    )
    model = FastLanguageModel.get_peft_model(loaded, r=4)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model, tokenizer


def die(*_: object, **__: object) -> None:
    """End this process as ``kill -9`` does."""
    os.kill(os.getpid(), signal.SIGKILL)


def kill_in_a_child(save: Callable[[], object], arm: Callable[[], None]) -> None:
    """Fork, and let the child save until it is killed where ``arm`` put :func:`die`, or when all files are there."""
    child = os.fork()
    if child:
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        return
    torch.set_num_threads(1)  # the parent's threads are not there after a fork, and would be waited for
    artifact.write_manifest = die
    arm()
    try:
        save()
    finally:
        os._exit(1)
