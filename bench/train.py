"""Whole training steps of a model with random weights, ours beside peers, in one process on one GPU.

Each case is a batch shape and a memory policy; each way of training it (plain transformers and PEFT, the same with
Liger's kernels, and this library's plan) runs on the very same weights and adapters. Reported: tokens a second (median
over steps, forward, backward and optimizer), peak of allocated and of reserved memory, kernel launches a step, kernel
time by kind for one micro-batch, how long the GPU waited, and how far loss and gradients are from plain PEFT's. Prints
a table and appends a line a case to bench/results/train.csv; ``--plot`` draws that file and runs nothing.

    python bench/train.py [--shape 8b] [--cases 2x2048x4 1x16384x1] [--ways ...] [--steps 4] [--dry-run]
"""

from __future__ import annotations

import argparse
import csv
import datetime
import gc
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import random_llama
import results_file
import torch
import transformers
import triton
from torch.autograd import DeviceType

from unsloth.core.errors import UnslothError
from unsloth.layers import fused_head, host_embedding
from unsloth.layers.block import BlockOptions
from unsloth.layers.fast import Fast
from unsloth.memory import checkpointing
from unsloth.memory.budget import Budget
from unsloth.models import record
from unsloth.models.patch import PatchPlan
from unsloth.models.plan import plan
from unsloth.train.adamw_8bit import AdamW8bit

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KINDS = {
    "product": ("gemm", "nvjet", "cutlass", "xmma", "splitk"),
    "attention": ("flash", "fmha", "sdpa", "cudnn"),
    "dequantization": ("dequant",),
    "optimizer": ("adam",),
    "loss": ("cross_entropy", "softmax", "logits"),
    "norm": ("norm",),
    "rotary": ("rope", "rotary"),
    "activation": ("glu", "silu"),
    "adapter": ("place_adapter", "append_projection"),
    "copy": ("memcpy", "memset", "copy"),
    "elementwise": ("elementwise", "reduce", "vectorized", "cat"),
}


@dataclass(frozen=True)
class Case:
    """A batch and how often its gradients are accumulated."""

    batch: int
    tokens: int
    accumulate: int

    @classmethod
    def parse(cls, text: str) -> Case:
        """``2x2048x4``."""
        return cls(*map(int, text.split("x")))

    def __str__(self) -> str:
        return f"{self.batch}x{self.tokens}x{self.accumulate}"


@dataclass(frozen=True)
class Row:
    """One line of the results file; memory in MiB, kernel time in milliseconds a micro-batch."""

    shape: str
    case: str
    way: str
    tokens_per_s: float
    allocated_mib: float
    reserved_mib: float
    launches: int
    kernel_ms: float
    wall_ms: float
    kinds: str
    loss: float
    loss_difference: float
    gradient_cosine: float
    options: str = ""
    gpu: str = field(default_factory=lambda: torch.cuda.get_device_name() if DEVICE.type == "cuda" else "none")
    torch: str = torch.__version__
    triton: str = triton.__version__
    transformers: str = transformers.__version__
    date: str = field(default_factory=lambda: datetime.date.today().isoformat())


class Way:
    """A way to train: switched on for a model, measured, switched off.

    Args:
        name: ``hf``, ``liger`` or ``ours``, then ``-keep`` to keep all activations instead of recomputing them. Of ours
            also ``-parts`` (recomputing, no block as one function), ``-calls`` (recomputing, blocks not recorded as
            graphs), ``-auto`` (as memory allows), or a number: GiB of the device for activations. Then ``+host``: with
            the input embedding in host memory.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        way, _, self.embedding = name.partition("+")
        self.kind, _, self.policy = way.partition("-")
        self.made: PatchPlan | None = None
        self.original: torch.nn.Module | None = None

    def enter(self, model: torch.nn.Module) -> None:
        """Change the model."""
        inner = record.transformers_model(model)
        checkpointing.apply(inner, self.memory())
        if self.embedding:
            self.original = inner.get_input_embeddings()
            host_embedding.move(inner)
            self.original.to("cpu")
        if self.kind == "ours":
            self.made = plan(model, attention=True, whole=self.policy != "parts", graphs=self.policy != "calls")
            self.made.apply()
            fused_head.install(inner)
        if self.kind == "liger":
            from liger_kernel.transformers import apply_liger_kernel_to_llama

            apply_liger_kernel_to_llama(model=inner)

    def memory(self) -> checkpointing.Policy:
        """The memory policy of the name."""
        if self.policy in ("keep", "auto", "", "parts", "calls"):
            return {"keep": False, "auto": "unsloth"}.get(self.policy, True)
        return Budget(device=int(float(self.policy) * 2**30))

    def leave(self, model: torch.nn.Module) -> None:
        """Take it back, Liger's excepted, which cannot be: it comes last."""
        if self.original is not None:
            record.transformers_model(model).set_input_embeddings(self.original.to(DEVICE))
        if self.made is not None:
            fused_head.remove(record.transformers_model(model))
            self.made.undo()

    def optimizer(self, trained: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        """8-bit AdamW: our own, and bitsandbytes' for the others."""
        if self.kind == "ours":
            return AdamW8bit(trained, lr=1e-4)
        import bitsandbytes as bnb

        return bnb.optim.AdamW8bit(trained, lr=1e-4)


def forward(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The loss under autocast, as trainers compute it."""
    with torch.autocast(DEVICE.type, torch.bfloat16):
        return model(input_ids=ids, labels=ids, use_cache=False).loss


def synchronize() -> None:
    """Wait for the GPU."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def measure_steps(model: torch.nn.Module, way: Way, case: Case, vocabulary: int, steps: int) -> dict[str, float]:
    """Median tokens a second and the peaks of memory over whole steps."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = way.optimizer(trained)
    times = []
    for number in range(steps + 1):
        ids = torch.randint(0, vocabulary, (case.accumulate, case.batch, case.tokens), device=DEVICE)
        synchronize()
        if number == 1 and DEVICE.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        for part in ids:
            (forward(model, part) / case.accumulate).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        synchronize()
        times.append(time.perf_counter() - start)
    median = statistics.median(times[1:])
    found = {"tokens_per_s": case.batch * case.tokens * case.accumulate / median, "allocated_mib": 0.0}
    found["reserved_mib"] = 0.0
    if DEVICE.type == "cuda":
        found["allocated_mib"] = torch.cuda.max_memory_allocated() / 2**20
        found["reserved_mib"] = torch.cuda.max_memory_reserved() / 2**20
    return found


def kind_of(kernel: str) -> str:
    """Which of ``KINDS`` a kernel is of."""
    name = kernel.lower()
    order = ("attention", "dequantization", "optimizer", "loss", "norm", "rotary", "activation", "adapter", "product")
    for kind in (*order, *KINDS):
        if any(part in name for part in KINDS[kind]):
            return kind
    return "other"


def profile(model: torch.nn.Module, ids: torch.Tensor) -> dict[str, Any]:
    """Launches, kernel time by kind and wall time of one micro-batch, and the names of the longest kernels."""
    if DEVICE.type != "cuda":
        return {"launches": 0, "kernel_ms": 0.0, "wall_ms": 0.0, "kinds": "", "longest": []}
    from torch.profiler import ProfilerActivity

    synchronize()
    start = time.perf_counter()
    forward(model, ids).backward()
    synchronize()
    wall = (time.perf_counter() - start) * 1e3
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as found:
        forward(model, ids).backward()
        synchronize()
    on_gpu = [event for event in found.events() if event.device_type == DeviceType.CUDA]
    events = [(event.name, event.time_range.elapsed_us() / 1e3) for event in on_gpu]
    by_kind: Counter[str] = Counter()
    by_name: Counter[str] = Counter()
    for name, ms in events:
        by_kind[kind_of(name)] += ms
        by_name[f"{kind_of(name)}: {name[:90]}"] += ms
    kinds = "; ".join(f"{kind} {ms:.1f}" for kind, ms in by_kind.most_common())
    total = sum(by_kind.values())
    return {
        "launches": len(events), "kernel_ms": total, "wall_ms": wall, "kinds": kinds,
        "longest": by_name.most_common(22),
    }  # fmt: skip


def gradients(model: torch.nn.Module, ids: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Loss, and all adapter gradients in one vector on the host."""
    model.zero_grad(set_to_none=True)
    loss = forward(model, ids)
    loss.backward()
    found = torch.cat([p.grad.float().flatten().cpu() for p in model.parameters() if p.grad is not None])
    model.zero_grad(set_to_none=True)
    return loss.item(), found


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """Of the angle between two gradients."""
    a, b = a.double(), b.double()
    return (torch.dot(a, b) / (a.norm() * b.norm())).item()


def allocator() -> str:
    """Settings of torch's allocator that are not its defaults."""
    return os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")


def clean(model: torch.nn.Module) -> None:
    """Drop gradients and cached memory."""
    model.zero_grad(set_to_none=True)
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


@torch.no_grad()
def restore(trained: list[torch.nn.Parameter], values: list[torch.Tensor]) -> None:
    """Set the adapters back, where they are."""
    for parameter, value in zip(trained, values, strict=True):
        parameter.copy_(value)


def run_case(
    model: torch.nn.Module, shape: str, case: Case, ways: list[str], steps: int, out_of_time: Callable[[], bool]
) -> list[Row]:
    """Every way of one case; the first way's loss and gradients are what the others' are compared with."""
    trained = [p for p in model.parameters() if p.requires_grad]
    start = [p.detach().cpu().clone() for p in trained]
    vocabulary = model.config.vocab_size
    ids = torch.randint(0, vocabulary, (case.batch, case.tokens), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    rows: list[Row] = []
    expected = None
    for name in ways:
        if out_of_time():
            print(f"{case} {name}: left out, no time")
            continue
        way = Way(name)
        way.enter(model)
        try:
            values = measure_steps(model, way, case, vocabulary, steps)
            more = profile(model, ids)
            restore(trained, start)
            loss, found = gradients(model, ids)  # last, when whatever a way does only later is being done
            expected = expected or (loss, found)
        except (RuntimeError, UnslothError) as error:  # out of memory among others
            print(f"{case} {name}: {type(error).__name__}: {str(error)[:500]}", flush=True)
            continue
        finally:
            clean(model)
            restore(trained, start)
            way.leave(model)
        longest = more.pop("longest")
        difference = loss - expected[0]
        rows.append(Row(shape, str(case), name, **values, **more, loss=loss, loss_difference=difference,
                        gradient_cosine=cosine(found, expected[1]), options=allocator()))  # fmt: skip
        show(rows[-1:], longest, way.made)
    return rows


def show(rows: list[Row], longest: list[tuple[str, float]] | None = None, made: PatchPlan | None = None) -> None:
    """The table; of one row, with its longest kernels."""
    for row in rows:
        print(
            f"{row.shape:5} {row.case:12} {row.way:10} {row.tokens_per_s:9.0f} tok/s"
            f"  {row.allocated_mib / 1024:6.2f} GiB ({row.reserved_mib / 1024:6.2f} reserved)"
            f"  {row.launches:6} launches  kernels {row.kernel_ms:7.1f} of {row.wall_ms:7.1f} ms"
            f"  loss {row.loss:.5f} ({row.loss_difference:+.5f})  cos {row.gradient_cosine:.6f}",
            flush=True,
        )
        print(f"      {row.kinds}", flush=True)
    for name, ms in longest or ():
        print(f"        {ms:8.2f} ms  {name}")
    if made is not None:
        keepers = {r.fast.options.keeper for r in made.replacements if isinstance(getattr(r, "fast", None), Fast)
                   and isinstance(r.fast.options, BlockOptions)}  # fmt: skip
        for keeper in keepers - {None}:
            chosen = keeper.assignment
            recorded = sum(len(shape.captured) for shape in keeper.shapes.values())
            print(f"      places: {dict(Counter(p.value for p in chosen.places))}, holding {chosen.holding},", end=" ")
            print(f"{recorded} blocks recorded, failed: {any(s.failed for s in keeper.shapes.values())}", flush=True)
        print("\n".join(line for line in str(made).splitlines() if "partly" in line or "declined" in line))


def plot() -> Path:
    """Tokens a second against peak memory, a panel a case, of the newest line of each way."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with (results_file.RESULTS / "train.csv").open(newline="") as handle:
        newest = {(row["shape"], row["case"], row["way"], row["options"]): row for row in csv.DictReader(handle)}
    cases = list(dict.fromkeys((shape, case) for shape, case, *_ in newest))
    figure, axes = pyplot.subplots(1, len(cases), figsize=(5 * len(cases), 4), squeeze=False)
    for axis, (shape, case) in zip(axes[0], cases, strict=True):
        for (*place, way, options), row in newest.items():
            if tuple(place) == (shape, case):
                x, y = float(row["allocated_mib"]) / 1024, float(row["tokens_per_s"])
                axis.scatter(x, y)
                axis.annotate(f"{way} {options}".strip(), (x, y))
        axis.set(title=f"{shape}, {case}", xlabel="peak allocated, GiB", ylabel="tokens/s")
        axis.set_ylim(bottom=0)
    figure.tight_layout()
    path = results_file.RESULTS / "train.png"
    figure.savefig(path, dpi=120)
    return path


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="8b", choices=list(random_llama.SHAPES))
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--cases", nargs="+", default=["2x2048x4"])
    parser.add_argument("--ways", nargs="+", default=["hf", "hf-keep", "ours", "ours-keep", "liger"])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=1e9, help="start no further measurement after these")
    parser.add_argument("--dry-run", action="store_true", help="a tiny model; writes nothing")
    parser.add_argument("--plot", action="store_true")
    arguments = parser.parse_args()
    if arguments.plot:
        print(plot())
        return
    begin = time.perf_counter()
    shape = random_llama.SHAPES["tiny" if arguments.dry_run else arguments.shape]
    if arguments.layers:
        shape = random_llama.Shape(**{**asdict(shape), "layers": arguments.layers})
    label = (
        "tiny" if arguments.dry_run else arguments.shape + (f", {arguments.layers} layers" if arguments.layers else "")
    )
    model = random_llama.build(shape, DEVICE)
    print(f"built {label} in {time.perf_counter() - begin:.1f} s")
    rows = []
    for text in arguments.cases:
        case = Case.parse(text)
        done = lambda: time.perf_counter() - begin > arguments.seconds
        rows += run_case(model, label, case, arguments.ways, arguments.steps, done)
    show(rows)
    if rows and not arguments.dry_run:
        print(f"appended to {results_file.append('train.csv', rows)}")


if __name__ == "__main__":
    main()
