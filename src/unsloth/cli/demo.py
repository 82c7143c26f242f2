"""`unsloth demo`: the whole way from a model and a data set to a model of one's own, in a few minutes."""

from __future__ import annotations

import logging
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from unsloth.api import FastLanguageModel
from unsloth.core import artifact
from unsloth.core.errors import StorageError
from unsloth.data import demo as data
from unsloth.models.embedded import SMOLLM2
from unsloth.train.config import SFTConfig
from unsloth.train.history import plot_loss
from unsloth.train.responses import train_on_responses_only
from unsloth.train.sft import SFTTrainer

_FREE_BYTES = 1_000_000_000
_SHOWN = 4  # held-out answers printed side by side


@dataclass(frozen=True)
class DemoOptions:
    """What may be changed about the demo.

    Attributes:
        output: Folder for everything that is made.
        steps: Training steps of 8 rows; 56 go over the data one and a quarter times.
        seed: Seed of the adapter and of the order of the rows.
    """

    output: str = "demo_output"
    steps: int = 56
    seed: int = 3407


@dataclass
class Score:
    """How well the model does on the held-out rows: mean loss in nats per token, and its answers."""

    loss: float
    answers: list[str]
    right: list[bool] = field(default_factory=list)

    @property
    def exact(self) -> str:
        """Exactly right answers, as a count and a share."""
        return f"{sum(self.right)} of {len(self.right)} ({sum(self.right) / len(self.right):.0%})"


def run(options: DemoOptions, console: Console | None = None) -> None:
    """Run the demo and print what came of it.

    Raises:
        UnslothError: A step failed; the folders written until then are whole.
    """
    console = console or Console()
    if not console.is_terminal:
        transformers_logging.disable_progress_bar()
        logging.getLogger("datasets").setLevel(logging.ERROR)
    started = time.monotonic()
    output = _prepare_output(Path(options.output))
    console.rule("1. A model in 4 bits, with an adapter")
    model, tokenizer = FastLanguageModel.from_pretrained(SMOLLM2, max_seq_length=256, load_in_4bit=True)
    model = FastLanguageModel.get_peft_model(
        model, r=16, lora_alpha=32, use_gradient_checkpointing=False, random_state=options.seed
    )
    trained, total = model.get_nb_trainable_parameters()  # type: ignore[operator]
    console.print(f"{trained:,} of {total:,} parameters are trained")

    console.rule("2. Café orders to kitchen tickets")
    heldout = data.heldout_rows()
    trainer = _trainer(model, tokenizer, heldout, output, options)
    before = _score(trainer, tokenizer, heldout)
    console.print(f"held out, before training: loss {before.loss:.3f}, exactly right {before.exact}")

    console.rule("3. Training")
    trainer.train()
    after = _score(trainer, tokenizer, heldout)
    untrained = {"step": 0, "eval_loss": before.loss}
    curve = plot_loss([untrained, *trainer.state.log_history], output / "loss.png")
    _show_answers(console, heldout, before, after)

    console.rule("4. Saving")
    model.save_pretrained(output / "adapter")
    tokenizer.save_pretrained(str(output / "adapter"))
    comparison = model.save_pretrained_merged(output / "merged_16bit", tokenizer)
    shutil.rmtree(output / "checkpoints", ignore_errors=True)  # holds only the trainer's bookkeeping
    _show_summary(console, output, curve, before, after)
    console.print(f"The merged model, loaded again with plain transformers: {comparison}.")
    console.print(f"Done in {(time.monotonic() - started) / 60:.1f} minutes.")


def _prepare_output(output: Path) -> Path:
    """Create the folder, and find out before the work whether it can be written and has room."""
    if output.exists() and not output.is_dir():
        raise StorageError("the output folder is a file", got=output, do="Choose another with --output.")
    try:
        output.mkdir(parents=True, exist_ok=True)
        probe = output / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise StorageError(
            f"cannot write to {output} ({error.strerror})", do="Choose another with --output."
        ) from error
    artifact.check_space(output, _FREE_BYTES)
    return output


def _trainer(
    model: Any, tokenizer: PreTrainedTokenizerBase, heldout: list[dict], output: Path, options: DemoOptions
) -> SFTTrainer:
    trainer = SFTTrainer(
        model=model,
        tokenizer=tokenizer,
        train_dataset=data.train_rows(),
        eval_dataset=heldout,
        args=SFTConfig(
            output_dir=str(output / "checkpoints"),
            per_device_train_batch_size=8,
            per_device_eval_batch_size=16,
            max_steps=options.steps,
            learning_rate=2e-3,
            warmup_steps=3,
            lr_scheduler_type="linear",
            weight_decay=0.0,
            train_sampling_strategy="group_by_length",
            logging_steps=1,
            eval_strategy="steps",
            eval_steps=14,
            save_strategy="no",
            seed=options.seed,
        ),
    )
    return train_on_responses_only(trainer)


def _score(trainer: SFTTrainer, tokenizer: PreTrainedTokenizerBase, rows: list[dict]) -> Score:
    loss = trainer.evaluate()["eval_loss"]
    answers = _answer(FastLanguageModel.for_inference(trainer.model), tokenizer, rows)
    right = [answer == row["messages"][-1]["content"] for answer, row in zip(answers, rows, strict=True)]
    return Score(loss, answers, right)


@torch.inference_mode()
def _answer(model: Any, tokenizer: PreTrainedTokenizerBase, rows: list[dict], batch: int = 24) -> list[str]:
    """The model's greedy answers to the rows' questions."""
    prompts = [
        tokenizer.apply_chat_template(row["messages"][:-1], tokenize=False, add_generation_prompt=True) for row in rows
    ]
    answers = []
    for start in range(0, len(prompts), batch):
        inputs = tokenizer(
            prompts[start : start + batch],
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=False,
        ).to(model.device)
        tokens = model.generate(**inputs, max_new_tokens=48, do_sample=False)
        answers += tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in answers]


def _show_answers(console: Console, rows: list[dict], before: Score, after: Score) -> None:
    """A few held-out orders with both answers: such that training mended first."""
    mended = [i for i in range(len(rows)) if after.right[i] and not before.right[i]]
    chosen = (mended + [i for i in range(len(rows)) if i not in mended])[:_SHOWN]
    table = Table(title="Held-out orders", show_lines=True)
    for heading in ("order", "before", "after", "right answer"):
        table.add_column(heading, overflow="fold", ratio=1)
    for i in chosen:
        order, answer = (message["content"] for message in rows[i]["messages"][-2:])
        table.add_row(*(escape(text) for text in (order, before.answers[i][:200], after.answers[i], answer)))
    console.print(table)


def _show_summary(console: Console, output: Path, curve: Path, before: Score, after: Score) -> None:
    scores = Table(title="Held-out rows, before and after")
    for heading in ("", "before", "after"):
        scores.add_column(heading)
    scores.add_row("loss (nats per token)", f"{before.loss:.3f}", f"{after.loss:.3f}")
    scores.add_row("exactly right", before.exact, after.exact)
    console.print(scores)
    made = Table(title="What was made")
    for heading in ("what", "where", "size", "how to use it"):
        made.add_column(heading, overflow="fold")
    made.add_row("loss curve", str(curve), _size(curve), "open the picture")
    made.add_row(
        "adapter", str(output / "adapter"), _size(output / "adapter"), "FastLanguageModel.from_pretrained(folder)"
    )
    made.add_row(
        "merged model",
        str(output / "merged_16bit"),
        _size(output / "merged_16bit"),
        "AutoModelForCausalLM.from_pretrained(folder)",
    )
    console.print(made)


def _size(path: Path) -> str:
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    size = sum(file.stat().st_size for file in files)
    return f"{size / 1e6:,.1f} MB" if size >= 1e6 else f"{size / 1e3:,.0f} kB"
