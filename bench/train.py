"""Whole training steps of a model with random weights, ours beside peers, in one process on one GPU.

Each case is the shape of a batch; each way of training it (plain transformers and PEFT, the same with Liger's kernels,
TRL's trainer, this library's plan under a memory policy, its trainer) runs on the very same weights and adapters.
Reported: tokens a second without padding (median over updates: forward, backward and optimizer), peak of allocated and
of reserved memory, what the library's rules say of the former, kernel launches and kernel time by kind for one
micro-batch, how long the GPU waited, and how far loss and gradients of an update are from the first way's. Prints a
table and appends a line a case to bench/results/train.csv; ``--plot`` draws that file and runs nothing. Of rows longer
than 32,768 tokens one update is measured, without a profile and a comparison, and with a cap (``@24``) the first one.
A case may name its own ways: ``1x16384x1=ours-0+host,liger``.

    python bench/train.py [--shape 8b] [--cases 2x2048x4 8xspreadx8] [--ways ...] [--trained qlora] [--dry-run]
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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import random_llama
import results_file
import torch
import transformers
import triton
from torch.autograd import DeviceType
from train_batches import Batch, Case, batches
from train_ways import Way, train

from unsloth.core.errors import UnslothError
from unsloth.layers.block import BlockOptions
from unsloth.layers.fast import Fast
from unsloth.memory.allocator import ALLOCATOR_VARIABLES, grow_segments
from unsloth.models.patch import PatchPlan

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
class Row:
    """One line of the results file; memory in MiB, kernel time in milliseconds a micro-batch.

    ``over_mib`` is the peak over weights, optimizer states and gradients, with what recorded graphs use while they run,
    and ``estimated_mib`` what the rules of the library say of it.
    """

    shape: str
    case: str
    way: str
    tokens_per_s: float
    allocated_mib: float
    reserved_mib: float
    over_mib: float
    estimated_mib: float
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


def forward(model: torch.nn.Module, batch: Batch, items: int | None = None) -> torch.Tensor:
    """The loss under autocast, as trainers compute it: a mean, or a sum divided by ``items``."""
    more = {} if items is None else {"num_items_in_batch": items}
    with torch.autocast(DEVICE.type, torch.float16 if model.dtype == torch.float16 else torch.bfloat16):
        return model(**batch, **more, use_cache=False).loss


def synchronize() -> None:
    """Wait for the GPU."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def watch_memory() -> None:
    """From now on, peaks are of what follows."""
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peaks() -> dict[str, float]:
    """Of allocated and reserved memory, in MiB."""
    if DEVICE.type != "cuda":
        return {"allocated_mib": 0.0, "reserved_mib": 0.0}
    found = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return {"allocated_mib": found[0] / 2**20, "reserved_mib": found[1] / 2**20}


def allocated_mib() -> float:
    """Memory in MiB of tensors on the device now."""
    return torch.cuda.memory_allocated() / 2**20 if DEVICE.type == "cuda" else 0.0


def limit(gib: float) -> None:
    """What torch's allocator may take; 0 for all there is."""
    if DEVICE.type == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gib * 2**30 / total) if gib else 1.0)


def recorded_mib() -> float:
    """Memory in MiB that recorded graphs use while they run, which counts as reserved but not as allocated."""
    if DEVICE.type != "cuda":
        return 0.0
    pools = (part for part in torch.cuda.memory_snapshot() if tuple(part.get("segment_pool_id", (0, 0))) != (0, 0))
    return sum(part["total_size"] - part["allocated_size"] for part in pools) / 2**20


def trained_items(case: Case, seed: int) -> int:
    """Positions of an update whose next token counts."""
    return sum(length - 1 for length in case.lengths(seed))


def update(model: torch.nn.Module, way: Way, case: Case, vocabulary: int, seed: int) -> torch.Tensor:
    """Forward and backward of all micro-batches; the loss. Gradients in float16 are scaled, as trainers do."""
    total = torch.zeros((), device=DEVICE)
    scale = 2.0**14 if model.dtype == torch.float16 else 1.0
    for batch in batches(case, vocabulary, seed, DEVICE, packed=way.packed):
        loss = forward(model, batch, trained_items(case, seed))
        (scale * loss).backward()
        total += loss.detach()
    return total


def measure_steps(model: torch.nn.Module, way: Way, case: Case, vocabulary: int, options: Options) -> dict[str, float]:
    """Median tokens a second, and the peaks of memory, over whole updates after those that warm up."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = way.optimizer(trained)
    gc.collect()
    watch_memory()  # graphs of an earlier way are gone with it
    speeds, before, of_others = [], allocated_mib(), recorded_mib()
    warm_up = options.updates_before(way, case)
    for seed in range(warm_up + options.steps):
        synchronize()
        if seed == warm_up:
            watch_memory()
        start = time.perf_counter()
        update(model, way, case, vocabulary, seed)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        synchronize()
        speeds.append(sum(case.lengths(seed)) / (time.perf_counter() - start))
        print(f"        {speeds[-1]:.0f} tok/s", flush=True)
    found = {"tokens_per_s": statistics.median(speeds[warm_up:]), **peaks()}
    gradients, accumulated = sum(p.nbytes for p in trained), case.accumulate > 1
    states = (value for state in optimizer.state.values() for value in state.values())
    static = before + sum(value.nbytes for value in states if isinstance(value, torch.Tensor)) / 2**20
    found["over_mib"] = found["allocated_mib"] + recorded_mib() - of_others - static
    found["over_mib"] = max(0.0, found["over_mib"] - (gradients / 2**20 if accumulated else 0.0))
    expected = way.estimate(case.batch * case.tokens, vocabulary, gradients, accumulated=accumulated)
    found["estimated_mib"] = expected / 2**20
    return found


def measure_trainer(
    model: torch.nn.Module, way: Way, case: Case, vocabulary: int, options: Options
) -> dict[str, float]:
    """The same of a trainer's updates."""
    warm_up = options.updates_before(way, case)
    count = warm_up + options.steps
    seconds = train(model, way, case, vocabulary, count).seconds
    speeds = [sum(case.lengths(seed)) / s for seed, s in enumerate(seconds)]
    print(f"        {[round(speed) for speed in speeds]} tok/s", flush=True)
    return {
        "tokens_per_s": statistics.median(speeds[warm_up:]),
        **peaks(),
        "over_mib": 0.0,
        "estimated_mib": 0.0,
    }


def kind_of(kernel: str) -> str:
    """Which of ``KINDS`` a kernel is of."""
    name = kernel.lower()
    order = ("attention", "dequantization", "optimizer", "loss", "norm", "rotary", "activation", "adapter", "product")
    for kind in (*order, *KINDS):
        if any(part in name for part in KINDS[kind]):
            return kind
    return "other"


def profile(model: torch.nn.Module, batch: Batch, wanted: bool) -> dict[str, Any]:
    """Launches, kernel time by kind and wall time of one micro-batch, and the names of the longest kernels."""
    if DEVICE.type != "cuda" or not wanted:
        return {"launches": 0, "kernel_ms": 0.0, "wall_ms": 0.0, "kinds": "", "longest": []}
    from torch.profiler import ProfilerActivity

    synchronize()
    start = time.perf_counter()
    forward(model, batch).backward()
    synchronize()
    wall = (time.perf_counter() - start) * 1e3
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as found:
        forward(model, batch).backward()
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


def gradients(model: torch.nn.Module, way: Way, case: Case, vocabulary: int) -> tuple[float, list[torch.Tensor]]:
    """Loss of an update, and the gradients of adapters (of full fine-tuning: every hundredth number) on the host."""
    model.zero_grad(set_to_none=True)
    loss = update(model, way, case, vocabulary, seed=3)
    every = 1 if any("lora_" in name for name, _ in model.named_parameters()) else 100
    found = [p.grad.flatten()[::every].float().cpu() for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return loss.item(), found


def cosines(a: list[torch.Tensor], b: list[torch.Tensor]) -> tuple[float, float]:
    """Of the angle between two gradients as a whole, and the lowest of one parameter."""
    products = torch.tensor([[x.double() @ y.double(), x.double() @ x.double(), y.double() @ y.double()]
                             for x, y in zip(a, b, strict=True)])  # fmt: skip
    each = products[:, 0] / (products[:, 1] * products[:, 2]).sqrt()
    whole = products.sum(0)
    return (whole[0] / (whole[1] * whole[2]).sqrt()).item(), each.min().item()


def allocator() -> str:
    """Settings of torch's allocator that are not its defaults."""
    return next((os.environ[name] for name in ALLOCATOR_VARIABLES if os.environ.get(name)), "")


def clean(model: torch.nn.Module) -> None:
    """Drop gradients and cached memory."""
    model.zero_grad(set_to_none=True)
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


@torch.no_grad()
def restore(trained: list[torch.nn.Parameter], values: list[torch.Tensor]) -> None:
    """Set trained weights back, in the dtype that they had: TRL changes it."""
    for parameter, value in zip(trained, values, strict=True):
        if parameter.dtype != value.dtype:
            parameter.data = value.to(parameter.device)
        else:
            parameter.copy_(value)


def run_case(model: torch.nn.Module, label: str, case: Case, options: Options) -> list[Row]:
    """Every way of one case; the first way's loss and gradients are what the others' are compared with."""
    trained = [p for p in model.parameters() if p.requires_grad]
    start = [p.detach().cpu().clone() for p in trained]
    vocabulary = model.config.vocab_size
    rows: list[Row] = []
    expected = None
    for name in options.ways:
        if time.perf_counter() > options.deadline:
            print(f"{case} {name}: left out, no time")
            continue
        way = Way(name)
        clean(model)  # of what the way before held
        way.enter(model)
        try:
            if way.kind in ("trl", "trainer"):
                values = measure_trainer(model, way, case, vocabulary, options)
                more, loss, found = profile(model, {}, wanted=False), float("nan"), None
            else:
                values = measure_steps(model, way, case, vocabulary, options)
                first = batches(case, vocabulary, 3, DEVICE, packed=way.packed)[0]
                more = profile(model, first, options.profiled)
                restore(trained, start)
                # last, when whatever a way does only later is being done
                loss, found = gradients(model, way, case, vocabulary) if options.compared else (float("nan"), None)
            expected = expected or (loss, found)
        except (RuntimeError, UnslothError) as error:  # out of memory among others
            print(f"{case} {name}: {type(error).__name__}: {str(error)[:500]}", flush=True)
            continue
        finally:
            way.leave(model)
            clean(model)
            restore(trained, start)
        longest = more.pop("longest")
        same = found is not None and expected[1] is not None
        alike, lowest = cosines(found, expected[1]) if same else (float("nan"), float("nan"))
        rows.append(Row(label, str(case), name, **values, **more, loss=loss,
                        loss_difference=loss - expected[0] if same else float("nan"),
                        gradient_cosine=alike,
                        options=options.text()))  # fmt: skip
        show(rows[-1:], longest, way.made)
        print(f"      lowest cosine of one parameter's gradient: {lowest:.6f}", flush=True)
        if not options.dry:
            results_file.append("train.csv", rows[-1:])
    return rows


def show(rows: list[Row], longest: list[tuple[str, float]] | None = None, made: PatchPlan | None = None) -> None:
    """The table; of one row, with its longest kernels."""
    for row in rows:
        print(
            f"{row.shape:5} {row.case:12} {row.way:10} {row.tokens_per_s:9.0f} tok/s"
            f"  {row.allocated_mib / 1024:6.2f} GiB ({row.reserved_mib / 1024:6.2f} reserved)"
            f"  over {row.over_mib / 1024:6.2f} (estimated {row.estimated_mib / 1024:6.2f})"
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

    panels: dict[str, dict[str, tuple[float, float]]] = {}
    with (results_file.RESULTS / "train.csv").open(newline="") as handle:
        for row in csv.DictReader(handle):
            trained = row["options"].split(";")[0] if row["options"].startswith(("lora", "full", "mixed")) else "qlora"
            if row["allocated_mib"]:
                panel = panels.setdefault(f"{row['shape']}, {trained}, {row['case']}", {})
                panel[row["way"]] = float(row["allocated_mib"]) / 1024, float(row["tokens_per_s"])
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(4.5 * columns, 4 * rows), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (title, ways) in zip(axes.flat, panels.items(), strict=False):
        for way, (x, y) in ways.items():
            axis.scatter(x, y, label=way)
        axis.set(title=title, xlabel="peak allocated, GiB", ylabel="tokens/s")
        axis.set_ylim(0, 1.15 * axis.get_ylim()[1])
        axis.set_xlim(0, 1.15 * axis.get_xlim()[1])
        axis.legend(fontsize=7, loc="lower right")
    figure.tight_layout()
    path = results_file.RESULTS / "train.png"
    figure.savefig(path, dpi=100)
    return path


@dataclass(frozen=True)
class Options:
    """What all cases of a run have in common.

    Attributes:
        ways: Names of :class:`train_ways.Way`.
        steps: Updates that are measured.
        warm_up: Updates before them.
        profiled: Whether kernels are looked at.
        compared: Whether losses and gradients are.
        trained: As on the command line.
        deadline: On the performance counter, after which no measurement begins.
        dry: Whether nothing is written.
    """

    ways: list[str]
    steps: int
    warm_up: int
    profiled: bool
    compared: bool
    trained: str
    deadline: float
    dry: bool

    def of(self, case: Case, ways: str) -> Options:
        """For one case, with its own ways: long updates are few, and where memory is capped nothing else counts."""
        own = replace(self, ways=ways.split(",") if ways else self.ways)
        if not case.is_long:
            return own
        warm_up = 0 if case.cap else min(1, self.warm_up)
        return replace(own, warm_up=warm_up, steps=1, profiled=False, compared=False)

    def updates_before(self, way: Way, case: Case) -> int:
        """Updates that warm up; more where blocks are recorded when a length has come three times."""
        return self.warm_up + (12 if way.packed and not case.tokens else 0)

    def text(self) -> str:
        """For the results file."""
        return "; ".join(part for part in ("" if self.trained == "qlora" else self.trained, allocator()) if part)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="8b", choices=list(random_llama.SHAPES))
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument(
        "--trained",
        default="qlora",
        choices=["qlora", "lora", "full", "mixed"],
        help="LoRA on NF4 or on 16 bits; all weights, in 16 bits or in float32 with bfloat16 products",
    )
    parser.add_argument(
        "--cases", nargs="+", default=["2x2048x4"], help="rows x tokens (or spread) x accumulation[@GiB]"
    )
    parser.add_argument("--ways", nargs="+", default=["hf", "hf-keep", "ours", "ours-keep", "liger"])
    parser.add_argument("--float16", action="store_true", help="as on GPUs without bfloat16")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--warm-up", type=int, default=1)
    parser.add_argument("--no-profile", action="store_true")
    parser.add_argument("--no-parity", action="store_true")
    parser.add_argument("--segments", action="store_true", help="torch's own setting of its allocator")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no further measurement after these")
    parser.add_argument("--dry-run", action="store_true", help="a tiny model; writes nothing")
    parser.add_argument("--plot", action="store_true")
    return parser.parse_args()


def refuse_after_liger(ways: list[str]) -> None:
    """Liger's kernels stay in a model: what is measured after them, in any case, would be theirs."""
    first = next((at for at, way in enumerate(ways) if way.startswith("liger")), len(ways))
    later = [way for way in ways[first:] if not way.startswith("liger")]
    if later:
        raise SystemExit(f"bench train: {', '.join(later)} after liger, which stays in the model; give liger last")


def main() -> None:
    """Entry point."""
    given = parse()
    if given.plot:
        print(plot())
        return
    asked = [text.partition("=")[2] or ",".join(given.ways) for text in given.cases]
    refuse_after_liger([way for ways in asked for way in ways.split(",")])
    begin = time.perf_counter()
    if not given.segments:
        print(f"segments grow: {grow_segments()}")
    shape = random_llama.SHAPES["tiny" if given.dry_run else given.shape]
    if given.layers:
        shape = replace(shape, layers=given.layers)
    label = ("tiny" if given.dry_run else given.shape) + (f", {given.layers} layers" if given.layers else "")
    model = random_llama.build(
        shape,
        DEVICE,
        quantized=given.trained == "qlora",
        full=given.trained in ("full", "mixed"),
        dtype=torch.float16 if given.float16 else torch.float32 if given.trained == "mixed" else torch.bfloat16,
    )
    print(f"built {label} in {time.perf_counter() - begin:.1f} s", flush=True)
    options = Options(
        ways=given.ways,
        steps=given.steps,
        warm_up=given.warm_up,
        profiled=not given.no_profile,
        compared=not given.no_parity,
        trained=given.trained + (", float16" if given.float16 else ""),
        deadline=begin + given.seconds,
        dry=given.dry_run,
    )
    rows = []
    for text in given.cases:
        wanted, _, ways = text.partition("=")
        case = Case.parse(wanted)
        limit(case.cap)
        rows += run_case(model, label, case, options.of(case, ways))
    show(rows)


if __name__ == "__main__":
    main()
