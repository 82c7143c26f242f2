"""`unsloth train`: from a run's file to a trained model, or, dry, to what that would take."""

from __future__ import annotations

import difflib
import math
import resource
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from unsloth.api import FastLanguageModel
from unsloth.cli import methods, options, screen
from unsloth.cli.run_config import DataOptions, RunConfig
from unsloth.core import device
from unsloth.core.errors import ConfigError, StorageError
from unsloth.data import masking, packing, prepare, sources
from unsloth.models import adapters, load, plan, source, tokenizer
from unsloth.models.patch import PatchPlan
from unsloth.train import estimate, skeleton
from unsloth.train.config import SFTConfig
from unsloth.train.history import plot_loss
from unsloth.train.progress import TrainingProgress

_SHOWN_TOKENS = 400


@dataclass(frozen=True)
class Rows:
    """Rows as tokens and labels, and what was counted while they were prepared."""

    rows: Dataset
    report: prepare.PrepareReport

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(len(ids) for ids in self.rows["input_ids"])

    @property
    def shortest(self) -> int:
        """Tokens of the shortest row."""
        return min(len(ids) for ids in self.rows["input_ids"])


@dataclass(frozen=True)
class Run:
    """A run that is ready to begin: everything checked that can be checked before weights are loaded."""

    load: load.LoadOptions
    adapter: adapters.AdapterOptions | None
    training: Any
    tokenizer: PreTrainedTokenizerBase
    train: Rows | methods.PreferenceRows | methods.PromptRows
    evaluation: Rows | methods.PreferenceRows | methods.PromptRows | None
    memory: estimate.MemoryEstimate | None  # not where completions are generated
    plan: PatchPlan | None

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        if self.training.max_steps > 0:
            return self.training.max_steps
        count = len(self.train.rows)
        if isinstance(self.train, methods.PromptRows):
            used = count // (self.training.generation_batch_size // self.training.num_generations)
            batches = used * self.training.steps_per_generation * self.training.num_iterations
            return math.ceil(
                self.training.num_train_epochs * max(batches // self.training.gradient_accumulation_steps, 1)
            )
        if isinstance(self.train, Rows) and self.training.packing and self.training.max_length:
            count = len(packing.pack([len(ids) for ids in self.train.rows["input_ids"]], self.training.max_length))
        batches = math.ceil(count / self.training.per_device_train_batch_size)
        steps = math.ceil(batches / self.training.gradient_accumulation_steps)
        return math.ceil(self.training.num_train_epochs * max(steps, 1))


def train(config: RunConfig, *, resume: bool = False, trust_remote_code: bool = False) -> None:
    """Carry out a run, and say what came of it.

    Raises:
        UnslothError: Something about the run is wrong, or failed; whatever can be is found before weights are loaded.
    """
    console = _console()
    output = _writable(options.output_folder(config))
    run = prepare_run(config, trust_remote_code=trust_remote_code)
    console.print(_summary(run, config))
    model, loaded_tokenizer = FastLanguageModel.from_pretrained(**options.model_arguments(config, trust_remote_code))
    if config.adapter is not None or not hasattr(model, "peft_config"):
        model = FastLanguageModel.get_peft_model(model, **options.adapter_arguments(config))
    _show_plan(console, plan.installed(model))
    trainer = methods.method_of(config).trainer(
        model=model,
        tokenizer=loaded_tokenizer,
        train_dataset=run.train.rows,
        eval_dataset=run.evaluation.rows if run.evaluation else None,
        args=run.training,
    )
    outcome = trainer.train(resume_from_checkpoint=True if resume else None)
    speed = next(
        (c.tokens_per_second for c in trainer.callback_handler.callbacks if isinstance(c, TrainingProgress)), 0
    )
    made = _save(config, output, trainer, loaded_tokenizer)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    facts: dict[str, object] = {"steps": outcome.global_step, "mean loss": f"{outcome.training_loss:.4f}"}
    if losses:
        facts["loss, first and last"] = f"{losses[0]:.4f}, {losses[-1]:.4f}"
    rewards = [entry["reward"] for entry in trainer.state.log_history if entry.get("reward") is not None]
    if rewards:
        facts["reward, first and last"] = f"{rewards[0]:.4f}, {rewards[-1]:.4f}"
    evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    if evaluated:
        facts["held-out loss, last"] = f"{evaluated[-1]:.4f}"
    facts["tokens/s"] = f"{speed:,.0f}"
    facts["peak memory"] = _peak_memory()
    console.print(screen.facts("\nThe run", {**facts, **made}))


def dry_run(config: RunConfig, *, trust_remote_code: bool = False) -> None:
    """Show what a run would do: its first row with the trained tokens, its steps, its memory. Writes nothing.

    Raises:
        UnslothError: Something about the run is wrong.
    """
    console = _console()
    _check_not_a_file(options.output_folder(config))
    run = prepare_run(config, trust_remote_code=trust_remote_code)
    console.print(_summary(run, config))
    _show_plan(console, run.plan)
    console.print()
    console.print(first_row(console, run))
    console.print("\nDry run: nothing was trained or written.")


def prepare_run(config: RunConfig, *, trust_remote_code: bool = False) -> Run:
    """Check a run, prepare its rows and estimate its memory, without loading weights.

    Raises:
        UnslothError: Something about the run is wrong.
    """
    if config.data is None:
        raise ConfigError(
            f"{config.origin} has no section 'data'", do="Add data: and, indented below, path: with your file."
        )
    loading = options.load_options(config, trust_remote_code)
    training = options.training_options(config)
    adapter = options.adapter_options(config, loading)
    found = source.resolve(loading.model_name, revision=loading.revision, token=loading.token)
    rows = read_rows(config.data, config.data.path, config.data.split)
    rows, held_out = _hold_out(config.data, rows)
    model_config = estimate.read_config(loading)
    if training.max_length is None:
        own = getattr(model_config.get_text_config(), "max_position_embeddings", None)
        training.max_length = min(loading.max_seq_length, own or loading.max_seq_length)
    loaded_tokenizer = tokenizer.load(
        _tokenizer_location(found, loading),
        max_seq_length=training.max_length,
        fix=loading.fix_tokenizer,
        trust_remote_code=trust_remote_code,
    )
    built = skeleton.build(model_config, loading, adapter, fast_layers=config.has_fast_layers)
    method = methods.method_of(config)
    if method.prepare is not None:
        pairs, held_out_pairs = (
            None if part is None else method.prepare(part, loaded_tokenizer, training) for part in (rows, held_out)
        )
        assert pairs is not None
        memory = None
        if isinstance(pairs, methods.PreferenceRows):
            memory = estimate.estimate(loading, adapter, training, built=built, sequence_length=pairs.longest)
        return Run(loading, adapter, training, loaded_tokenizer, pairs, held_out_pairs, memory, built.plan)
    prepared = _prepared(rows, loaded_tokenizer, training, config.data)
    evaluation = None if held_out is None else _prepared(held_out, loaded_tokenizer, training, config.data)
    memory = estimate.estimate(
        loading,
        adapter,
        training,
        built=built,
        sequence_length=training.max_length if training.packing else prepared.longest,
        padded=False if prepared.shortest == prepared.longest else None,
    )
    return Run(loading, adapter, training, loaded_tokenizer, prepared, evaluation, memory, built.plan)


def read_rows(data: DataOptions, path: str, split: str) -> sources.Rows:
    """The rows of a file, a folder or a hub id; a file that is not there gets the nearest name.

    Raises:
        ConfigError: There is no such file.
        DataError: It cannot be read; names the line.
    """
    place = Path(path).expanduser()
    looks_local = place.suffix.lower() in sources.SUFFIXES or path.startswith((".", "/", "~")) or path.count("/") > 1
    if not place.exists() and looks_local:
        near = difflib.get_close_matches(place.name, [p.name for p in place.parent.glob("*")], 1, 0.6)
        do = f"Did you mean {place.with_name(near[0])}?" if near else "Paths start at the folder you are in."
        raise ConfigError("no such data file", got=path, do=do)
    rows = sources.load_rows(path, split=split, kind=data.format)
    return rows if data.rows is None else _part(rows, 0, data.rows)


def _part(rows: sources.Rows, start: int, stop: int) -> sources.Rows:
    stop = min(stop, len(rows))
    return rows.select(range(start, stop)) if isinstance(rows, Dataset) else rows[start:stop]


def first_row(console: Console, run: Run) -> Text:
    """The first row as tokens: trained ones green, the others dim; between brackets where there are no colors."""
    tokens = _tokens_of(run.train)
    colors = screen.shows_colors(console)
    trained_style, other_style = ("green", "dim") if colors else ("", "")
    text = Text().append("First row, ", style="bold")
    text.append("trained tokens in green\n" if colors else "trained tokens between [[ and ]]\n")
    inside = False
    for position, (token, trained) in enumerate(tokens):
        if position == _SHOWN_TOKENS:
            text.append(f"\n... and {len(tokens) - position} more tokens")
            break
        if trained != inside and not colors:
            text.append("[[" if trained else "]]")
        inside = trained
        text.append(screen.visible(run.tokenizer.decode([token])), style=trained_style if trained else other_style)
    text.append("]]" if inside and not colors else "")
    return text


def _tokens_of(rows: Rows | methods.PreferenceRows | methods.PromptRows) -> list[tuple[int, bool]]:
    """The tokens of the first row, and whether each is trained; with preferences, its prompt and each answer."""
    if isinstance(rows, methods.PromptRows):
        return [(token, False) for token in rows.first]
    row = rows.rows[0]
    if isinstance(rows, Rows):
        # Nothing comes before the first token, so it is never predicted.
        labels = [masking.IGNORED, *row["labels"][1:]]
        return [(token, label != masking.IGNORED) for token, label in zip(row["input_ids"], labels, strict=True)]
    found = []
    for name in rows.answers:
        found += [(token, False) for token in row["prompt_ids"]] + [(token, True) for token in row[name]]
    return found


def _console() -> Console:
    console = screen.console()
    if not console.is_terminal:
        transformers_logging.disable_progress_bar()
        datasets.disable_progress_bars()
    return console


def _hold_out(data: DataOptions, rows: sources.Rows) -> tuple[sources.Rows, sources.Rows | None]:
    """The training rows and the held-out ones."""
    if data.eval_path or data.eval_split:
        whole = replace(data, rows=None)
        return rows, read_rows(whole, data.eval_path or data.path, data.eval_split or "train")
    if data.eval_rows is None:
        return rows, None
    if data.eval_rows >= len(rows):
        raise ConfigError(
            f"data.eval_rows would hold out all of the {len(rows)} rows",
            got=data.eval_rows,
            do=f"Use at most {max(len(rows) // 2, 1)}.",
        )
    cut = len(rows) - data.eval_rows
    return _part(rows, 0, cut), _part(rows, cut, len(rows))


def _prepared(rows: sources.Rows, tokens: PreTrainedTokenizerBase, training: SFTConfig, data: DataOptions) -> Rows:
    markers = None
    if data.instruction_part is not None and data.response_part is not None:
        markers = masking.ResponseMarkers(data.instruction_part, data.response_part)
    elif data.responses_only or training.assistant_only_loss:
        markers = masking.find_markers(tokens)
    # Packing is left to the trainer, which gets tokens and labels.
    how = prepare.PrepareOptions(
        max_length=training.max_length,
        text_field=training.dataset_text_field,
        responses=markers,
        num_proc=training.dataset_num_proc,
        layout=training.layout,  # type: ignore[arg-type] # both are checked there
        long_rows=training.long_rows,  # type: ignore[arg-type]
        escape_control_tokens=training.escape_control_tokens,
        cache=training.cache_tokens,
    )
    training.assistant_only_loss = False  # the labels say so already
    dataset, report = prepare.prepare(rows, tokens, how)
    assert isinstance(dataset, Dataset) and report is not None  # rows that are not streamed
    return Rows(dataset, report)


def _tokenizer_location(found: source.Source, loading: load.LoadOptions) -> str:
    """An adapter's own folder if it holds a tokenizer, else its base model's."""
    if found.adapter_base is None or (Path(found.location) / "tokenizer_config.json").is_file():
        return found.location
    return source.resolve(found.adapter_base, token=loading.token).location


def _summary(run: Run, config: RunConfig) -> Table:
    training = run.training
    dtype = str(run.load.dtype or device.default_dtype()).removeprefix("torch.")
    held_as = {"4bit": "NF4 (4 bits)", "8bit": "int8", "16bit": dtype}.get(run.load.precision, "trained themselves")
    adapter = "none: full fine-tuning"
    if run.adapter is not None:
        names = run.adapter.target_modules
        listed = names if isinstance(names, str) else ", ".join(names)
        adapter = f"LoRA, rank {run.adapter.r}, alpha {run.adapter.lora_alpha:g}, on {listed}"
    batch = f"{training.per_device_train_batch_size} x {training.gradient_accumulation_steps} rows"
    facts = {
        "model": run.load.model_name,
        "weights": f"{held_as}, computed in {dtype}",
        "adapter": adapter,
        **_facts_of_rows(run),
        "steps": f"{run.steps:,} of {batch}",
        "results": options.output_folder(config),
    }
    if config.method != "sft":
        facts["method"] = config.method
    if run.memory is not None:
        share = run.memory.trainable_parameters / run.memory.total_parameters
        counts = f"{run.memory.trainable_parameters:,} of {run.memory.total_parameters:,}"
        facts |= {"trained": f"{counts} parameters ({share:.2%})", "memory": str(run.memory)}
    if run.evaluation is not None:
        facts["held out"] = f"{run.evaluation.report.rows:,} rows"
    return screen.facts("The run", facts)


def _facts_of_rows(run: Run) -> dict[str, object]:
    """What the table says of the training rows."""
    longest = f"up to {run.train.longest:,} tokens"
    if isinstance(run.train, methods.PreferenceRows | methods.PromptRows):
        return {"rows": f"{run.train.report}; of {longest}"}
    report = run.train.report
    rows = f"{report.rows:,} of {longest}"
    if report.truncated:
        rows += f"; {report.truncated:,} were longer than {run.training.max_length:,} and lost their end"
    if report.dropped:
        rows += f"; {report.dropped:,} had no token to train and were left out"
    share = report.trained_tokens / max(report.tokens, 1)
    return {"rows": rows, "tokens": f"{report.tokens:,}, of which {share:.0%} are trained"}


def _show_plan(console: Console, found: PatchPlan | None) -> None:
    said = "No plan (model.fast_layers is false): every layer runs as transformers and PEFT wrote it."
    console.print(str(found) if found is not None else said, markup=False)


def _check_not_a_file(output: Path) -> None:
    if output.exists() and not output.is_dir():
        raise StorageError(
            "the output folder is a file", got=output, do="Choose another with --set training.output_dir=FOLDER."
        )


def _writable(output: Path) -> Path:
    """Find out before the work whether the folder for the results can be written; a refused run leaves none behind."""
    _check_not_a_file(output)
    existing = next(folder for folder in (output.absolute(), *output.absolute().parents) if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise StorageError(
            f"cannot write to {output} ({error.strerror})", do="Choose another with --set training.output_dir=FOLDER."
        ) from error
    return output


def _save(config: RunConfig, output: Path, trainer: Any, tokens: PreTrainedTokenizerBase) -> Mapping[str, object]:
    """Write what the file asks for; return where each thing lies."""
    made: dict[str, object] = {}
    model: Any = trainer.model
    for method in config.save.methods or (["merged_16bit"] if config.is_full_finetuning else ["lora"]):
        folder = output / ("adapter" if method == "lora" else method)
        model.save_pretrained_merged(folder, tokens, save_method=method)
        made["adapter" if method == "lora" else "merged model"] = folder
    if config.save.plot and any("loss" in entry for entry in trainer.state.log_history):
        made["loss curve"] = plot_loss(trainer.state.log_history, output / "loss.png")
    return made


def _peak_memory() -> str:
    if torch.cuda.is_available():
        return f"{estimate.format_bytes(torch.cuda.max_memory_allocated())} on the GPU"
    scale = 1 if sys.platform == "darwin" else 1024
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
    return f"{estimate.format_bytes(resident)} resident, with all libraries"
