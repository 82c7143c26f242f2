"""GRPO with random weights: time and memory of whole steps, ours and TRL's, side by side.

    python bench/grpo.py [--cases 1.7b 1.5b-nf4 8b-nf4 8b-20k loss ...] [--trainers unsloth trl] [--steps 3] [--dry-run]

==========  ==============================================================================================
case        a step
==========  ==============================================================================================
1.7b        Qwen3-1.7B's shape in bfloat16, LoRA of rank 32: 8 prompts x 8 completions, 256 + 512 tokens
1.7b-short  the same shape, one prompt x 8 completions of 288 to 416 tokens, all but the last 8 given: what training
            takes where every step has other lengths
1.5b-nf4    Qwen2.5-1.5B's shape in NF4: one prompt x 8 completions, 256 + 512
8b-nf4      Llama-3.1-8B's shape in NF4: one prompt x 8 completions, 512 + 2,048
8b-20k      the same: 512 + 20,000 tokens, all but the last 64 of each completion given, so that the cache is filled by
            prefill; the last 64 are sampled with all eight alive at once
8b-47k      the same with 512 + 47,000 tokens
14b-32k     Qwen2.5-14B's shape in bfloat16, LoRA of rank 32: 512 + 31,500 tokens, given likewise
loss        log-probabilities, entropy and gradient of 8 x 20,480 hidden states and a vocabulary of 128,256
==========  ==============================================================================================

Weights are random, so that completions never end before their limit and every trainer has the same work. Every case has
a process of its own. The reward is a random number. "Rollout" is the memory while completions are sampled, the cache of
keys and values included, "training" that of the rest of a step, both as allocated by tensors, "reserved" the most
that torch took from the device in either, with the cache. TRL's trainer runs one step, and only cases whose completions
are sampled. A line a case is appended to bench/results/grpo.csv.

``--dry-run`` takes tiny models and lengths, also on the CPU, and writes nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import peft
import results_file
import torch
import transformers
import trl
from datasets import Dataset
from random_llama import SHAPES, TARGETS, Shape, build
from transformers import TrainerCallback

RESULTS = Path(os.environ.get("OUTDIR", Path(__file__).parent / "results")) / "grpo.csv"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
COLUMNS = ["date", "gpu", "torch", "transformers", "trl", "trainer", "case", "completions", "prompt", "completion"]
COLUMNS += ["first_step_s", "step_s", "rollout_s", "rollout_gib", "training_gib", "cache_gib", "reserved_gib", "passes"]
COLUMNS += ["mismatch", "correct"]


@dataclass(frozen=True)
class Case:
    """One line of the table; ``batch`` completions are a batch, of which the trainer may put several together."""

    shape: Shape
    quantized: bool
    prompts: int
    prompt: int
    completion: int
    batch: int
    given: bool = False
    sampled: int = 64  # tokens, where the others are given
    spread: int = 0  # by so many tokens completions may be shorter, where they are given
    qwen3: bool = False
    tied: bool = False


CASES = {
    "1.7b": Case(Shape(28, 2048, 6144, 16, 8, 151936), False, 8, 256, 512, 8, qwen3=True, tied=True),
    "1.7b-short": Case(
        Shape(28, 2048, 6144, 16, 8, 151936), False, 1, 256, 416, 8, True, 8, 128, qwen3=True, tied=True
    ),
    "1.5b-nf4": Case(Shape(28, 1536, 8960, 12, 2, 151936), True, 1, 256, 512, 8, tied=True),
    "8b-nf4": Case(SHAPES["8b"], True, 1, 512, 2048, 8),
    "8b-20k": Case(SHAPES["8b"], True, 1, 512, 20000, 1, given=True),
    "8b-47k": Case(SHAPES["8b"], True, 1, 512, 47000, 1, given=True),
    "14b-32k": Case(Shape(48, 5120, 13824, 40, 8, 152064), False, 1, 512, 31500, 1, given=True),
}
GROUP = 8


def arguments() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=[*CASES, "loss"], default=["1.7b", "loss"])
    parser.add_argument("--trainers", nargs="+", choices=["unsloth", "trl"], default=["unsloth"])
    parser.add_argument("--batch", type=int, help="completions that go through the model at once")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--budget", type=float, default=1.0, help="GiB that ours keeps between forward and backward")
    parser.add_argument("--tokens", type=int, help="tokens_per_pass of ours")
    parser.add_argument("--passes", type=int, help="stop before the pass after so many, for their memory alone")
    parser.add_argument("--unfilled", type=int, default=0, help="the last so many steps do without filling")
    parser.add_argument("--profile", action="store_true", help="show where the time of a step goes")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--child", dest="trainer", choices=["unsloth", "trl"], help=argparse.SUPPRESS)
    given = parser.parse_args()
    if not given.dry_run and DEVICE.type != "cuda":
        raise SystemExit("bench grpo: no CUDA device here; run this on a GPU machine, or pass --dry-run")
    return given


def case_of(name: str, dry: bool, batch: int | None = None) -> Case:
    """The case, or a tiny one of its kind."""
    case = CASES[name]
    if batch:
        case = dataclasses.replace(case, batch=batch)
    if not dry:
        return case
    shape = dataclasses.replace(SHAPES["tiny"], vocabulary=1024)
    quantized = case.quantized and DEVICE.type == "cuda"
    small = {
        "spread": min(case.spread, 8),
        "prompt": 12,
        "completion": 80 if case.given else 16,
        "prompts": min(case.prompts, 2),
    }
    return dataclasses.replace(case, shape=shape, quantized=quantized, batch=min(case.batch, GROUP), **small)


def make_model(case: Case) -> torch.nn.Module:
    """Random weights with an adapter whose B is zero, as a new one is."""
    shape, positions = case.shape, case.prompt + case.completion + 64
    if case.qwen3:
        config = transformers.Qwen3Config(
            vocab_size=shape.vocabulary,
            hidden_size=shape.hidden,
            intermediate_size=shape.inner,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.key_heads,
            head_dim=128 if shape.hidden >= 1024 else 16,
            max_position_embeddings=positions,
            tie_word_embeddings=True,
            attn_implementation="sdpa",
        )
        torch.manual_seed(0)
        with DEVICE:
            inner = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        options = peft.LoraConfig(r=shape.rank, lora_alpha=shape.rank, target_modules=TARGETS, task_type="CAUSAL_LM")
        model = peft.get_peft_model(inner.requires_grad_(False), options)
    else:
        model = build(shape, DEVICE, quantized=case.quantized, positions=positions)
        if case.tied:
            model.get_output_embeddings().weight = model.get_input_embeddings().weight
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
            if "lora_B" in name:
                torch.nn.init.zeros_(parameter)
    inner = model.get_base_model()
    inner.generation_config.eos_token_id = inner.config.eos_token_id = 1
    return model


def install(model: torch.nn.Module, case: Case, budget: float) -> None:
    """What loading by ``FastLanguageModel`` leaves: the record and the plan."""
    from unsloth.memory.budget import Budget
    from unsloth.models import plan, record

    inner = record.transformers_model(model)
    precision = "4bit" if case.quantized else "16bit"
    policy = Budget(device=int(budget * 2**30)) if budget else "unsloth"
    length = case.prompt + case.completion
    record.attach(inner, record.LoadRecord("random", None, precision, torch.bfloat16, length, policy, 0))
    print(plan.install(model), flush=True)


def make_tokenizer(vocabulary: int) -> transformers.PreTrainedTokenizerFast:
    """Words w0, w1, ... as tokens."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    words = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, vocabulary)}
    inner = Tokenizer(WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")


class Enough(Exception):
    """The passes that were asked for are over."""


class Meter(TrainerCallback):
    """Wall-clock time of every step, and memory of its two phases."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.rollout = self.training = self.cache = self.reserved = self.passes = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self.start = time.perf_counter()

    def sampled(self, cache: int) -> None:
        """The completions are there; ``cache`` bytes are held outside torch's own pool."""
        if DEVICE.type == "cuda":
            self.rollout = max(self.rollout, torch.cuda.max_memory_allocated() + cache)
            self.reserved = max(self.reserved, torch.cuda.max_memory_reserved() + cache)
            print(f"  sampled: {self.rollout / 2**30:.2f} GiB, {cache / 2**30:.2f} of it cache", flush=True)
            torch.cuda.reset_peak_memory_stats()
        self.cache = max(self.cache, cache)

    def passed(self, most: int | None) -> None:
        """A pass of completions through the model begins, the last of ``most``; says what those before it took."""
        if DEVICE.type == "cuda":
            self.training = max(self.training, torch.cuda.max_memory_allocated())
            self.reserved = max(self.reserved, torch.cuda.max_memory_reserved())
            print(f"  {self.passes} passes: {self.training / 2**30:.2f} GiB in training so far", flush=True)
        if self.passes == most:
            raise Enough
        self.passes += 1

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop it."""
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
            self.training = max(self.training, torch.cuda.max_memory_allocated())
            self.reserved = max(self.reserved, torch.cuda.max_memory_reserved())
        self.times.append(time.perf_counter() - self.start)
        print(f"  step {state.global_step}: {self.times[-1]:.3f} s", flush=True)


def trainer_of(given: argparse.Namespace, case: Case, folder: str, meter: Meter) -> Any:
    """The trainer of one case."""
    ours = given.trainer == "unsloth"
    if ours:
        from unsloth.train.grpo import GRPOTrainer
        from unsloth.train.grpo_config import GRPOConfig
    else:
        from trl.trainer.grpo_config import GRPOConfig
        from trl.trainer.grpo_trainer import GRPOTrainer
    model, tokenizer = make_model(case), make_tokenizer(case.shape.vocabulary)
    if ours:
        install(model, case, given.budget)
    generator = torch.Generator().manual_seed(1)

    def words(count: int) -> list[int]:
        return torch.randint(2, case.shape.vocabulary, (count,), generator=generator).tolist()

    rows = [{"prompt": " ".join(f"w{i}" for i in words(case.prompt))} for _ in range(case.prompts * (given.steps + 1))]
    total = case.prompts * GROUP
    args = GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=case.batch,
        gradient_accumulation_steps=total // case.batch,
        generation_batch_size=total,
        num_generations=GROUP,
        max_completion_length=case.completion,
        max_steps=given.steps,
        learning_rate=1e-5,
        optim="adamw_8bit" if DEVICE.type == "cuda" else "adamw_torch",
        lr_scheduler_type="constant",
        bf16=DEVICE.type == "cuda",
        use_cpu=DEVICE.type != "cuda",
        gradient_checkpointing=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **({"tokens_per_pass": given.tokens} if ours else {}),
    )

    def reward(completions: list[str], **columns: Any) -> list[float]:
        return torch.rand(len(completions), generator=generator).tolist()

    def given_but_the_last(prompts: list[str], trainer: Any) -> dict[str, Any]:
        ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
        shorter = torch.randint(case.spread + 1, (len(prompts),), generator=generator).tolist()
        known = [words(case.completion - case.sampled - less) for less in shorter]
        params = dataclasses.replace(trainer.rollouts.params, max_tokens=case.sampled)
        found = trainer.sample([one + other for one, other in zip(ids, known, strict=True)], params)
        unknown = float("nan")
        return {
            "prompt_ids": ids,
            "completion_ids": [one + other for one, other in zip(known, found.ids, strict=True)],
            "logprobs": [[unknown] * len(one) + other for one, other in zip(known, found.logprobs, strict=True)],
        }

    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[meter],
        **({"rollout_func": given_but_the_last} if case.given else {}),
    )
    generate = trainer._generate_single_turn if not ours else trainer.sample

    def measured(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        found = generate(*args, **kwargs)
        meter.sampled(trainer.rollouts.cache_bytes if ours else 0)
        trainer.sampling_seconds = time.perf_counter() - start
        return found

    scores = trainer._get_per_token_logps_and_entropies

    def counted(*args: Any, **kwargs: Any) -> Any:
        meter.passed(given.passes)
        if ours:
            trainer._fills &= trainer.state.global_step < given.steps - given.unfilled
        return scores(*args, **kwargs)

    trainer._get_per_token_logps_and_entropies = counted
    setattr(trainer, "sample" if ours else "_generate_single_turn", measured)
    return trainer


def run(given: argparse.Namespace) -> dict[str, Any]:
    """One case."""
    name = given.cases[0]
    case, meter = case_of(name, given.dry_run, given.batch), Meter()
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(given, case, folder, meter)
        with contextlib.suppress(Enough):
            trainer.train()
        if given.profile:
            profile(trainer)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    print(f"{given.trainer}, {name}: losses {[entry['loss'] for entry in logs]}")
    print(f"  lengths {[entry['completions/mean_length'] for entry in logs]}", flush=True)
    gib = [round(value / 2**30, 3) for value in (meter.rollout, meter.training, meter.cache, meter.reserved)]
    unknown = [float("nan")]  # of a run that was stopped within its first step
    mismatch = logs[-1].get("sampling/sampling_logp_difference/mean", unknown[0]) if logs else unknown[0]
    gpu = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
    versions = [torch.__version__, transformers.__version__, trl.__version__]
    steps = meter.times or unknown
    times = [round(steps[0], 2), round(min(steps[1:] or steps), 2), round(trainer.sampling_seconds, 2)]
    head = [date.today().isoformat(), gpu, *versions, given.trainer, name, case.prompts * GROUP]
    corrects = getattr(trainer, "_corrects", False)
    passes = meter.passes / len(steps)
    figures = [*head, case.prompt, case.completion, *times, *gib, passes, mismatch, corrects]
    return dict(zip(COLUMNS, figures, strict=True))


def profile(trainer: Any) -> None:
    """Where the time of one more batch goes, sampling included."""
    from torch.profiler import ProfilerActivity, profile

    batch = next(iter(trainer.get_train_dataloader()))
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if DEVICE.type == "cuda" else [])
    trainer._step = 0
    inputs = trainer._prepare_inputs(batch)
    for _ in range(3):
        start = time.perf_counter()
        trainer.compute_loss(trainer.model, inputs).backward()
        launched = time.perf_counter() - start
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        print(f"  a batch: {1e3 * (time.perf_counter() - start):.0f} ms, launched in {1e3 * launched:.0f}", flush=True)
    with profile(activities=activities) as found:
        trainer.compute_loss(trainer.model, inputs).backward()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
    order = "self_cuda_time_total" if DEVICE.type == "cuda" else "self_cpu_time_total"
    print(found.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=70), flush=True)


def loss_memory(dry: bool) -> None:
    """Peak of log-probabilities, entropy and backward beyond hidden states and their gradient."""
    from unsloth.kernels.logprobs import logprobs
    from unsloth.losses.policy import PolicyOptions, policy_loss

    rows, tokens, hidden, vocabulary = (2, 32, 64, 512) if dry else (8, 20480, 4096, 128256)
    states = torch.randn(rows * tokens, hidden, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(vocabulary, hidden, device=DEVICE, dtype=torch.bfloat16) * 0.02
    labels = torch.randint(0, vocabulary, (rows * tokens,), device=DEVICE)
    mask = torch.ones(rows, tokens, device=DEVICE)
    advantages = torch.randn(rows, device=DEVICE)
    for attempt in range(2):
        states.grad = None
        before = 0
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        start = time.perf_counter()
        found = logprobs(states, weight, labels, entropy=True)
        values = found.logprobs.view(rows, tokens)
        policy_loss(values, None, advantages, mask, PolicyOptions(loss_type="dapo")).loss.backward()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() - before - states.grad.numel() * 2
            seconds = time.perf_counter() - start
            print(f"loss, {rows} x {tokens} x {vocabulary}: {peak / 2**30:.2f} GiB beyond hidden states and their "
                  f"gradient, {seconds:.2f} s (run {attempt + 1})", flush=True)  # fmt: skip


def show(results: list[dict[str, Any]]) -> None:
    """The table."""
    names = ["trainer", *COLUMNS[COLUMNS.index("case") :]]
    print(*(f"{name:>12}" for name in names))
    for row in results:
        print(*(f"{row[name]!s:.12}".rjust(12) for name in names), flush=True)


def main() -> None:
    """Entry point."""
    given = arguments()
    if given.trainer is not None:
        print("RESULTS " + json.dumps(run(given)))
        return
    results: list[dict[str, Any]] = []
    for name in given.cases:
        if name == "loss":
            loss_memory(given.dry_run)
            if DEVICE.type == "cuda":
                torch.cuda.empty_cache()
            continue
        for trainer in given.trainers:
            command = [sys.executable, __file__, "--cases", name, "--child", trainer]
            command += ["--steps", str(given.steps if trainer == "unsloth" else 1), "--budget", str(given.budget)]
            command += ["--batch", str(given.batch)] if given.batch else []
            command += [] if given.tokens is None else ["--tokens", str(given.tokens)]
            command += [] if given.passes is None else ["--passes", str(given.passes)]
            command += ["--dry-run"] * given.dry_run + ["--profile"] * (given.profile and trainer == "unsloth")
            command += ["--unfilled", str(given.unfilled)]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
                assert process.stdout is not None
                for line in process.stdout:
                    if not line.startswith("RESULTS "):
                        print(line, end="", flush=True)
                        continue
                    results.append(json.loads(line.removeprefix("RESULTS ")))
                    if not given.dry_run:
                        results_file.append_lines(RESULTS, results[-1:], COLUMNS)
            if process.returncode:
                print(f"{trainer}, {name}: failed", flush=True)
            show(results)


if __name__ == "__main__":
    main()
