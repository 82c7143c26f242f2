"""DPO of a QLoRA model of Llama-3.1-8B's shape with random weights: ours and TRL's, side by side.

    python bench/preference.py [--shape 8b] [--pairs 4] [--length 1024] [--prompts 512 64 0] [--steps 8]
                               [--budgets 1.6 0] [--trainers trl unsloth] [--profile] [--dry-run]

Both get the same weights, adapters and rows, in a process each, and gradient checkpointing. A sequence is a prompt and
an answer of together ``--length`` tokens; a case for each length of prompt. 0 is the case of varied lengths, as data
sets have them: prompts with a median of an eighth of ``--length``, answers of a quarter, each from 8 tokens up to what
fits. ``--steps``: of all cases, or of each. ``--budgets``: GiB that ours may keep between forward and backward; 0 for
as much as is free. Tokens are those of both sequences of each pair, without padding, however many are computed; a
step's time is the median from the third step on, with varied lengths the mean. "Over" is the peak of a step minus what
was allocated before it: weights, adapters, their gradients and the optimizer's states. First, log-probabilities and
gradients of packed batches are compared with those of padded ones. Prints a table, and appends a line a case to
bench/results/preference.csv.

``--dry-run`` takes a tiny model, and writes nothing; ``--profile`` shows where the time of one step of ours goes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import results_file
import torch
import transformers
import trl
from random_llama import SHAPES, build
from transformers import TrainerCallback

RESULTS = Path(os.environ.get("OUTDIR", Path(__file__).parent / "results")) / "preference.csv"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
COLUMNS = ["date", "gpu", "torch", "transformers", "trl", "trainer", "budget_gib", "shape", "pairs", "length", "prompt"]
COLUMNS += ["step_ms", "tokens_per_s", "static_gib", "peak_gib", "over_gib"]


def arguments() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--shape", choices=list(SHAPES), default="8b")
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--prompts", type=int, nargs="+", default=[512, 64])
    parser.add_argument("--steps", type=int, nargs="+", default=[8])
    parser.add_argument("--budgets", type=float, nargs="+", default=[1.6, 0.0])
    parser.add_argument("--trainers", choices=["trl", "unsloth"], nargs="+", default=["trl", "unsloth"])
    parser.add_argument("--budget", type=float, default=0.0, help=argparse.SUPPRESS)
    parser.add_argument("--trainer", choices=["unsloth", "trl"], help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.dry_run:
        given.shape, given.pairs, given.length, given.prompts, given.steps = "tiny", 2, 32, [16, 4, 0], [4]
    if len(given.steps) not in (1, len(given.prompts)):
        parser.error("--steps takes one number, or one for each of --prompts")
    if not given.dry_run and DEVICE.type != "cuda":
        raise SystemExit("bench preference: no CUDA device here; run this on a GPU machine, or pass --dry-run")
    return given


class Meter(TrainerCallback):
    """Times every step, and takes its peak of memory after the second, when the optimizer has its states."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.static = self.peak = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            if state.global_step == 2:
                self.static = torch.cuda.memory_allocated()
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop it."""
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
            if state.global_step > 2:
                self.peak = max(self.peak, torch.cuda.max_memory_allocated())
        self.times.append(time.perf_counter() - self.start)


def steps_of(given: argparse.Namespace, prompt: int) -> int:
    """Of the case with prompts of that length."""
    return given.steps[given.prompts.index(prompt) if len(given.steps) > 1 else 0]


def rows(given: argparse.Namespace, prompt: int, seed: int = 1) -> list[dict[str, list[int]]]:
    """Pairs of random tokens, of lengths that vary where ``prompt`` is 0."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> list[int]:
        return torch.randint(4, SHAPES[given.shape].vocabulary, (count,), generator=generator).tolist()

    def around(median: float, most: int) -> int:
        drawn = median * math.exp(0.7 * torch.randn((), generator=generator).item())
        return max(8, min(most, round(drawn)))

    found = []
    for _ in range(given.pairs * steps_of(given, prompt)):
        first = prompt or around(given.length / 8, given.length // 2)
        rest = given.length - first
        answers = (rest, rest) if prompt else (around(given.length / 4, rest), around(given.length / 4, rest))
        found.append({"prompt_ids": draw(first), "chosen_ids": draw(answers[0]), "rejected_ids": draw(answers[1])})
    return found


def speed(given: argparse.Namespace, prompt: int, times: list[float]) -> tuple[float, float]:
    """(seconds a step, tokens a second), of steps from the third on."""
    if prompt:
        seconds = statistics.median(times[2:])
        return seconds, given.pairs * 2 * given.length / seconds
    lengths = [2 * len(r["prompt_ids"]) + len(r["chosen_ids"]) + len(r["rejected_ids"]) for r in rows(given, prompt)]
    tokens = [sum(lengths[i : i + given.pairs]) for i in range(0, len(lengths), given.pairs)]
    print(f"  tokens a step {tokens}")
    return statistics.mean(times[2:]), sum(tokens[2:]) / sum(times[2:])


def trainer_of(given: argparse.Namespace, model: torch.nn.Module, prompt: int, folder: str, meter: Meter) -> Any:
    """A trainer on prepared rows; TRL's takes them by leaving out its tokenizing."""
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    if given.trainer == "unsloth":
        from unsloth.train.dpo import DPOConfig, DPOTrainer
    else:
        from trl.trainer.dpo_config import DPOConfig
        from trl.trainer.dpo_trainer import DPOTrainer

        DPOTrainer = type("DPOTrainer", (DPOTrainer,), {"_prepare_dataset": lambda self, dataset, *args: dataset})
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>")),
        pad_token="<pad>",
        eos_token="<eos>",
    )
    args = DPOConfig(
        output_dir=folder,
        per_device_train_batch_size=given.pairs,
        max_length=given.length,
        max_steps=steps_of(given, prompt),
        learning_rate=1e-4,
        train_sampling_strategy="sequential",  # the same rows in the same order
        lr_scheduler_type="constant",
        bf16=DEVICE.type == "cuda",
        use_cpu=DEVICE.type != "cuda",
        gradient_checkpointing=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    return DPOTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(rows(given, prompt)),
        processing_class=tokenizer,
        callbacks=[meter],
    )


def prepare(given: argparse.Namespace) -> torch.nn.Module:
    """The model; ours with its plan, and the record that loading leaves."""
    model = build(SHAPES[given.shape], DEVICE, quantized=DEVICE.type == "cuda", positions=8192)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(parameter)  # as a new adapter is: both references are then the model without it
    if given.trainer == "unsloth":
        from unsloth.memory.budget import Budget
        from unsloth.models import record
        from unsloth.models.plan import install

        dtype = torch.bfloat16
        inner = record.transformers_model(model)
        policy = Budget(device=int(given.budget * 2**30)) if given.budget else "unsloth"
        record.attach(inner, record.LoadRecord("random", None, "4bit", dtype, given.length, policy, 0))
        print(install(model))
    return model


def run(given: argparse.Namespace) -> list[dict[str, Any]]:
    """All cases of one trainer."""
    model, results = prepare(given), []
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    for prompt in given.prompts:
        model.train()
        with torch.no_grad():
            for name, p in model.named_parameters():
                if p.requires_grad:
                    p.copy_(start[name])
        meter = Meter()
        with tempfile.TemporaryDirectory() as folder:
            trainer = trainer_of(given, model, prompt, folder, meter)
            trainer.train()
            losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        print(f"{given.trainer}, prompt {prompt}: losses {losses}")
        print(f"  ms a step {[round(1e3 * seconds) for seconds in meter.times]}", flush=True)
        grads = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        static = meter.static + grads
        seconds, tokens_per_s = speed(given, prompt, meter.times)
        gib = [round(value / 2**30, 3) for value in (static, meter.peak, meter.peak - static)]
        gpu = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
        versions = [torch.__version__, transformers.__version__, trl.__version__]
        figures = [given.trainer, given.budget, given.shape, given.pairs, given.length, prompt]
        figures += [round(1e3 * seconds), round(tokens_per_s)]
        print(f"  {round(tokens_per_s):,} tokens/s; static, peak and over in GiB {gib}", flush=True)
        results.append(dict(zip(COLUMNS, [date.today().isoformat(), gpu, *versions, *figures, *gib], strict=True)))
        if given.trainer == "unsloth":
            compare_graphs(trainer, rows(given, prompt, seed=2)[: given.pairs])
        if given.profile and given.trainer == "unsloth" and given.budget and prompt == given.prompts[0]:
            profile(trainer)
        del trainer
        if "ref" in model.peft_config:
            model.delete_adapter("ref")  # TRL's copy of the adapter
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()
    return results


def profile(trainer: Any) -> None:
    """Where the time of one step goes, and when the GPU waits."""
    from torch.profiler import ProfilerActivity, profile

    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if DEVICE.type == "cuda" else [])
    trainer.model.zero_grad()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    trainer.compute_loss(trainer.model, batch).backward()
    launched = time.perf_counter() - start
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    print(f"  loss and gradients: launched in {1e3 * launched:.0f} ms, done after {1e3 * seconds:.0f} ms", flush=True)
    trainer.model.zero_grad()
    with profile(activities=activities) as found:
        trainer.compute_loss(trainer.model, batch).backward()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
    trainer.model.zero_grad()
    kernels = [event for event in found.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    spans = sorted((e.time_range.start, e.time_range.end, e.name) for e in kernels if "Memcpy" not in e.name)
    busy, until, before, gaps = 0.0, spans[0][0] if spans else 0.0, "", []
    for first, last, name in spans:
        if first > until:
            gaps.append((first - until, before[:40], name[:40]))
        busy, until, before = busy + max(0.0, last - max(first, until)), max(until, last), name
    if spans:
        print(f"  kernels busy {busy / 1e3:.0f} ms of {(until - spans[0][0]) / 1e3:.0f}; longest waits, us:")
        for gap in sorted(gaps, reverse=True)[:8]:
            print("   ", *gap)
    order = "self_cuda_time_total" if DEVICE.type == "cuda" else "self_cpu_time_total"
    print(found.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=70), flush=True)


def compare_graphs(trainer: Any, unseen: list[dict[str, list[int]]]) -> None:
    """Loss and gradients of a new batch with recorded blocks and call by call; stop if they differ.

    Of one that was trained on the loss is 0: a single step learns random tokens by heart.
    """
    keeper = next(r.fast.options.keeper for r in record_of(trainer.model) if r.new.startswith("block"))
    if keeper is None:
        return
    batch = trainer._prepare_inputs(trainer.data_collator(unseen))
    found = []
    recorded = sum(2 * len(shape.captured) + len(shape.readings) for shape in keeper.shapes.values())
    for captures in (True, False):
        keeper.captures = captures
        trainer.model.zero_grad()
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        grads = torch.cat([p.grad.float().flatten() for p in trainer.model.parameters() if p.grad is not None])
        found.append((loss.item(), grads))
    keeper.captures = True
    trainer.model.zero_grad()
    (loss, grads), (other, plain) = found
    apart = (grads - plain).norm() / plain.norm()
    print(f"  {recorded} graphs; loss {loss:.5f}, call by call {other:.5f}; gradients {apart:.1e} apart", flush=True)
    if not (loss > 0.1 and abs(loss - other) < 0.05 and apart < 0.1):
        raise SystemExit("recorded blocks differ from those that are launched call by call")


def record_of(model: torch.nn.Module) -> list[Any]:
    """What the plan of ``model`` has put in."""
    from unsloth.models import record

    return record.transformers_model(model).unsloth_plan.replacements


def compare_packing(given: argparse.Namespace) -> None:
    """Log-probabilities and gradients of packed and of padded batches, with unequal lengths; stop if they differ."""
    from unsloth.models.plan import plan
    from unsloth.train.packed_rows import pack
    from unsloth.train.token_logprobs import TokenLogprobs

    shape = SHAPES["tiny" if given.dry_run else "0.6b"]
    model = build(shape, DEVICE, quantized=DEVICE.type == "cuda", positions=4096)
    made = plan(model, attention=True)
    made.apply()
    count = 24 if given.dry_run else 700
    ids = torch.randint(4, shape.vocabulary, (4, count), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    ids[2:, : count // 2] = ids[:2, : count // 2]
    attended = torch.ones_like(ids)
    attended[1, count - 5 :] = attended[2, count - 9 :] = 0
    answers = torch.arange(count, device=DEVICE).expand_as(ids) >= count // 2
    labels = ids.masked_fill(~(answers & attended.bool()), -100)
    found = {}
    for name in ("packed", "padded"):
        packed = pack(ids, attended, ~answers) if name == "packed" else None
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda"):
            compute = TokenLogprobs(model)
            assert compute.packs
            values = compute(model, {"input_ids": ids, "attention_mask": attended}, labels, packed)
        model.zero_grad()
        (values * torch.linspace(0, 1, values.numel(), device=DEVICE).view_as(values)).sum().backward()
        grads = torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None])
        found[name] = values.detach(), grads
    (one, one_grad), (other, other_grad) = found["packed"], found["padded"]
    apart = (one - other).norm() / other.norm(), (one_grad - other_grad).norm() / other_grad.norm()
    print(f"packed against padded: log-probabilities {apart[0]:.1e} apart, gradients {apart[1]:.1e}", flush=True)
    if not (apart[0] < 0.01 and apart[1] < 0.1):
        raise SystemExit("packed batches differ from padded ones")


def show(results: list[dict[str, Any]]) -> None:
    """The table, and how ours compares."""
    names = ["trainer", "budget_gib", "prompt", "step_ms", "tokens_per_s", "static_gib", "peak_gib", "over_gib"]
    print(*(f"{name:>13}" for name in names))
    for row in results:
        print(*(f"{row[name]!s:>13}" for name in names))
    for theirs in (row for row in results if row["trainer"] == "trl"):
        for ours in results:
            if ours["trainer"] == "trl" or ours["prompt"] != theirs["prompt"]:
                continue
            times, over = (ours[name] / theirs[name] if theirs[name] else 0.0 for name in ("tokens_per_s", "over_gib"))
            case = f"prompt {ours['prompt']}, budget {ours['budget_gib']}"
            print(f"{case}: ours is {times:.2f} times as fast, with {over:.2f} of the memory over static")


def main() -> None:
    """Entry point."""
    given = arguments()
    if given.trainer is not None:
        print("RESULTS " + json.dumps(run(given)))
        return
    compare_packing(given)
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
    results = []
    cases = [(name, budget) for name in given.trainers for budget in (given.budgets if name == "unsloth" else [0.0])]
    for trainer, budget in cases:
        command = [sys.executable, __file__, *sys.argv[1:], "--trainer", trainer, "--budget", str(budget)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("RESULTS "):
                    results += json.loads(line.removeprefix("RESULTS "))
                else:
                    print(line, end="", flush=True)
        if process.returncode:
            raise SystemExit(process.returncode)
    show(results)
    if given.dry_run:
        return
    results_file.append_lines(RESULTS, results, COLUMNS)


if __name__ == "__main__":
    main()
