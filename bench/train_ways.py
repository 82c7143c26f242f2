"""The ways to train that bench/train.py compares, each switched on for a model and off again."""

from __future__ import annotations

import tempfile
import time
from typing import Any

import torch
import transformers
from train_batches import Case, rows

from unsloth.layers import fused_head, host_embedding
from unsloth.memory import checkpointing
from unsloth.memory.budget import Budget
from unsloth.models import record
from unsloth.models.patch import PatchPlan
from unsloth.models.plan import plan
from unsloth.train import block_memory
from unsloth.train.adamw_8bit import AdamW8bit

_RECOMPUTED = ("", "parts", "calls")


class Way:
    """A way to train: switched on for a model, measured, switched off.

    Args:
        name: ``hf``, ``liger``, ``ours``, ``trl`` (TRL's ``SFTTrainer`` with its own defaults) or ``trainer`` (ours),
            then ``-keep`` to keep all activations instead of recomputing them. Of ours also ``-parts`` (recomputing,
            no block as one function), ``-calls`` (recomputing, blocks not recorded as graphs), ``-auto`` (as memory
            allows, the default of the library), or a number: GiB of the device for activations, and after a slash
            GiB of the host. Of the trainers also ``-packed`` (theirs) and ``-padded`` (ours, with padding). Then
            ``+host``: with the input embedding in host memory.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        way, _, self.embedding = name.partition("+")
        self.kind, _, self.policy = way.partition("-")
        self.made: PatchPlan | None = None
        self.blocks: block_memory.Blocks | None = None
        self.original: torch.nn.Module | None = None

    @property
    def packed(self) -> bool:
        """Whether it takes rows of unequal length without padding."""
        return self.kind in ("ours", "trainer")

    def enter(self, model: torch.nn.Module) -> None:
        """Change the model."""
        inner = record.transformers_model(model)
        checkpointing.apply(inner, self.memory())
        if self.embedding:
            self.original = inner.get_input_embeddings()
            host_embedding.move(inner)
            self.original.to("cpu")
        if self.kind in ("ours", "trainer"):
            graphs = None if self.kind == "trainer" else self.policy != "calls"
            self.made = plan(model, attention=True, whole=self.policy != "parts", graphs=graphs)
            self.blocks = block_memory.find(self.made, inner)
            self.made.apply()
            fused_head.install(inner)
        if self.kind == "liger":
            from liger_kernel.transformers import apply_liger_kernel_to_llama

            apply_liger_kernel_to_llama(model=inner)

    def memory(self) -> checkpointing.Policy:
        """The memory policy of the name."""
        if self.policy == "keep":
            return False
        if self.policy == "auto" or (self.kind == "trainer" and self.policy in ("", "padded")):
            return "unsloth"
        if self.policy in _RECOMPUTED or self.kind not in ("ours", "trainer"):
            return True
        device, _, host = self.policy.partition("/")
        return Budget(int(float(device) * 2**30), int(float(host) * 2**30) if host else None)

    def estimate(self, tokens: int, vocabulary: int, gradients: int, *, accumulated: bool) -> int:
        """Bytes over weights, optimizer states and accumulated gradients, by our rules; 0 where they do not say."""
        policy = self.memory()
        if self.blocks is None or policy == "unsloth":
            return 0
        found = block_memory.measure(self.blocks, policy, tokens, 2, vocabulary)
        added, *rest = found.peak(gradients, accumulated=accumulated)
        return sum(rest) + (0 if accumulated else added)

    def leave(self, model: torch.nn.Module) -> None:
        """Take it back, Liger's excepted, which cannot be: it comes last."""
        if self.original is not None:
            inner = record.transformers_model(model)
            inner.set_input_embeddings(self.original.to(inner.get_output_embeddings().weight.device))
        if self.made is not None:
            fused_head.remove(record.transformers_model(model))
            self.made.undo()

    def optimizer(self, trained: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        """8-bit AdamW: our own, and bitsandbytes' for the others."""
        if self.kind == "ours":
            return AdamW8bit(trained, lr=1e-4)
        import bitsandbytes as bnb

        return bnb.optim.AdamW8bit(trained, lr=1e-4)


class Meter(transformers.TrainerCallback):
    """Seconds of each update of a trainer, and the peaks of memory from the second on."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.start = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            if state.global_step == 1:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop it."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.start)


def train(model: torch.nn.Module, way: Way, case: Case, vocabulary: int, updates: int) -> Meter:
    """Updates by a trainer as its users run it: rows of token ids go in, its own collator makes batches."""
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    given = [{"input_ids": row.tolist()} for seed in range(updates) for row in rows(case, vocabulary, seed)]
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>")),
        pad_token="<pad>",
        eos_token="<eos>",
    )
    more: dict[str, Any] = {}
    if way.kind == "trl":
        from trl import SFTConfig, SFTTrainer

        more = {"gradient_checkpointing": way.policy != "keep", "packing": way.policy == "packed"}
        more["bf16"] = torch.cuda.is_available()
    else:
        from unsloth import SFTConfig, SFTTrainer

        inner = record.transformers_model(model)
        form = record.LoadRecord("random", None, "4bit", inner.dtype, 2**17, way.memory(), 0)
        record.attach(inner, form)
        more = {"padding_free": False} if way.policy == "padded" else {}
    meter = Meter()
    longest = max(len(row["input_ids"]) for row in given)
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=case.batch,
            gradient_accumulation_steps=case.accumulate,
            max_length=longest,
            max_steps=updates,
            optim="adamw_8bit",
            logging_steps=1000,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            **more,
        )
        SFTTrainer(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_list(given),
            processing_class=tokenizer,
            callbacks=[meter],
        ).train()
    return meter
