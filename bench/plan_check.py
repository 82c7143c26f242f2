"""A model of Llama-3.1-8B's width with a few layers, NF4 and LoRA: with its plan on and off, equal and how fast.

Loss and adapter gradients of both are compared with a float32 computation of the same weights, so that "equal" means:
as near to the exact result as plain PEFT is. Then forward and backward are timed, and their peak memory taken, with
recomputation and without. Prints a table, and appends a line a case to bench/results/plan_check.csv.

    python bench/plan_check.py [--layers 4] [--batch 2] [--tokens 2048] [--rank 32] [--dry-run]

``--dry-run`` takes a tiny model, and writes nothing; it is what a machine without a GPU can do.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import bitsandbytes as bnb
import peft
import results_file
import torch
import transformers
import triton

from unsloth.models.patch import PatchPlan
from unsloth.models.plan import plan
from unsloth.quant import nf4

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Gradients = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """Of the model and the batch."""

    layers: int
    batch: int
    tokens: int
    rank: int
    hidden: int = 4096
    inner: int = 14336
    heads: int = 32
    key_heads: int = 8
    vocabulary: int = 128256


@dataclass(frozen=True)
class Row:
    """One line of the results file.

    Attributes:
        case: The shape, and whether activations are recomputed.
        plan: "off" or "on".
        ms: Median of forward and backward.
        tokens_per_s: What that makes.
        peak_mib: Peak allocated, weights included; 0 without a GPU.
        loss: At the compared dtype.
        loss_error: Relative to float32.
        gradient_error: Largest of all adapter gradients, relative to the largest element of each in float32.
    """

    case: str
    plan: str
    ms: float
    tokens_per_s: float
    peak_mib: float
    loss: float
    loss_error: float
    gradient_error: float
    gpu: str = field(default_factory=lambda: torch.cuda.get_device_name() if DEVICE.type == "cuda" else "none")
    torch: str = torch.__version__
    triton: str = triton.__version__
    transformers: str = transformers.__version__
    date: str = field(default_factory=lambda: datetime.date.today().isoformat())


def build(shape: Shape, dtype: torch.dtype) -> torch.nn.Module:
    """The same weights at every call; those of blocks in NF4, the others and the computation in ``dtype``."""
    config = transformers.LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        max_position_embeddings=shape.tokens,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    with DEVICE:
        model = transformers.LlamaForCausalLM(config).bfloat16()  # rounded once, whatever dtype follows
    for name, module in list(model.named_modules()):
        if type(module) is torch.nn.Linear and "layers" in name:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, quantized(module, dtype))
    model = model.to(dtype)
    model.is_loaded_in_4bit = True
    nf4.keep_layout(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    adapter = peft.LoraConfig(r=shape.rank, lora_alpha=shape.rank, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, adapter)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model.train()


def quantized(module: torch.nn.Linear, dtype: torch.dtype) -> torch.nn.Module:
    """The layer in NF4 with double quantization."""
    new = bnb.nn.Linear4bit(
        module.in_features, module.out_features, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta"
    )
    new.weight = bnb.nn.Params4bit(
        module.weight.data.to(dtype), requires_grad=False, quant_type="nf4", compress_statistics=True, module=new
    )
    return new.to(DEVICE)


def checkpoint(model: torch.nn.Module, on: bool) -> None:
    """Switch recomputation of the blocks on or off."""
    inner = model.get_base_model()
    name = "activation_checkpointing" if hasattr(inner, "activation_checkpointing_enable") else "gradient_checkpointing"
    if on:
        getattr(inner, f"{name}_enable")({"use_reentrant": False})
        inner.enable_input_require_grads()
    else:
        getattr(inner, f"{name}_disable")()


def step(model: torch.nn.Module, ids: torch.Tensor, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    """Forward and backward under autocast, gradients from zero."""

    def run() -> torch.Tensor:
        for parameter in model.parameters():
            parameter.grad = None
        with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        return loss.detach()

    return run


def result(run: Callable[[], torch.Tensor], model: torch.nn.Module) -> tuple[float, Gradients]:
    """Loss and adapter gradients."""
    loss = run().item()
    return loss, {n: p.grad.float().cpu() for n, p in model.named_parameters() if p.grad is not None}


def gradient_error(found: Gradients, exact: Gradients) -> float:
    """See :class:`Row`."""
    return max(((found[n] - g).abs().max() / g.abs().max()).item() for n, g in exact.items())


def measure(run: Callable[[], torch.Tensor], repetitions: int) -> tuple[float, float]:
    """Median milliseconds, and the peak of allocated memory in MiB."""
    times = []
    for _ in range(2):
        run()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    for _ in range(repetitions):
        start = time.perf_counter()
        run()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    peak = torch.cuda.max_memory_allocated() / 2**20 if DEVICE.type == "cuda" else 0.0
    return statistics.median(times), peak


def check(shape: Shape, repetitions: int) -> list[Row]:
    """Both ways, with recomputation and without."""
    ids = torch.randint(0, shape.vocabulary, (shape.batch, shape.tokens), device=DEVICE)
    model = build(shape, torch.float32)
    exact_loss, exact = result(step(model, ids, torch.float32), model)
    del model
    model = build(shape, torch.bfloat16)
    made = plan(model)
    run = step(model, ids, torch.bfloat16)
    rows = []
    for recompute in (True, False):
        checkpoint(model, recompute)
        for name in ("off", "on"):
            if name == "on":
                made.apply()
            loss, found = result(run, model)
            ms, peak = measure(run, repetitions)
            case = f"{shape.layers} layers, {shape.batch} x {shape.tokens}, r {shape.rank}"
            case += ", recomputed" if recompute else ""
            speed = shape.batch * shape.tokens / ms * 1e3
            errors = abs(loss - exact_loss) / exact_loss, gradient_error(found, exact)
            rows.append(Row(case, name, ms, speed, peak, loss, *errors))
            made.undo()
    show(made, rows)
    return rows


def show(made: PatchPlan, rows: list[Row]) -> None:
    """The plan with its counters, and the table."""
    print(made, end="\n\n")
    print(f"{'case':40} plan {'ms':>9} {'tokens/s':>10} {'peak MiB':>9} {'loss':>9} {'loss err':>9} {'grad err':>9}")
    for row in rows:
        print(
            f"{row.case:40} {row.plan:4} {row.ms:9.1f} {row.tokens_per_s:10.0f} {row.peak_mib:9.0f} {row.loss:9.5f} "
            f"{row.loss_error:9.1e} {row.gradient_error:9.1e}"
        )


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("layers", 4), ("batch", 2), ("tokens", 2048), ("rank", 32), ("repetitions", 10)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    if arguments.dry_run:
        check(Shape(2, 2, 32, 8, hidden=64, inner=96, heads=4, key_heads=2, vocabulary=256), repetitions=2)
        return
    if DEVICE.type != "cuda":
        raise SystemExit("bench plan_check: no CUDA device here; run this on a GPU machine, or pass --dry-run")
    shape = Shape(arguments.layers, arguments.batch, arguments.tokens, arguments.rank)
    found = check(shape, arguments.repetitions)
    print(f"appended to {results_file.append('plan_check.csv', found)}")


if __name__ == "__main__":
    main()
