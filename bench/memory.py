"""The memory of one update beside what ``unsloth estimate`` says: peak over weights, adapters and optimizer states.

Models have random weights (bench/random_llama.py), whole or with fewer layers. A case is
``shape/layers:batch x tokens x accumulation @ cap in GiB = way``, of which shape, layers and cap may be left out; ways
are those of bench/train.py.
Optimizer states exist beforehand, so that one update is as any later one. ``--residents`` lists what was alive at the
peak, and where it was made. Appends to bench/results/memory.csv.

    python bench/memory.py 1x2048x1=ours-keep 8b/4:1x262144x1=ours-0/60+host [--residents] [--dry-run]
"""

from __future__ import annotations

import argparse
import datetime
import gc
import time
from dataclasses import dataclass, field, replace
from typing import Any

import random_llama
import results_file
import torch
import train
from train_batches import Case
from train_ways import Way

from unsloth import SFTConfig
from unsloth.core.errors import UnslothError
from unsloth.layers.block_sizes import RECORDED_ROWS
from unsloth.memory.allocator import grow_segments
from unsloth.models.adapters import AdapterOptions
from unsloth.models.load import LoadOptions
from unsloth.train.estimate import estimate

DEVICE = train.DEVICE
_UPDATES_BEFORE = 3


@dataclass(frozen=True)
class Row:
    """One line of the results file; memory in MiB."""

    shape: str
    layers: int
    case: str
    way: str
    seconds: float
    static_mib: float
    peak_mib: float
    reserved_mib: float
    over_mib: float
    estimated_mib: float
    off_percent: float
    gpu: str = field(default_factory=lambda: torch.cuda.get_device_name() if DEVICE.type == "cuda" else "none")
    torch: str = torch.__version__
    date: str = field(default_factory=lambda: datetime.date.today().isoformat())


def estimated(shape: random_llama.Shape, case: Case, way: Way) -> int:
    """Bytes over weights, adapters and optimizer states, as the command says."""
    policy = way.memory()
    training = SFTConfig(
        per_device_train_batch_size=case.batch,
        gradient_accumulation_steps=case.accumulate,
        max_length=case.tokens,
        optim="adamw_8bit",
        report_to="none",
        bf16=DEVICE.type == "cuda",
        use_cpu=DEVICE.type != "cuda",
        padding_free=True,
    )
    training._checkpointing_follows_model = True
    loading = LoadOptions("random", precision="4bit", dtype=torch.bfloat16, use_gradient_checkpointing=policy)
    adapter = AdapterOptions(r=shape.rank, use_gradient_checkpointing=policy)
    config = random_llama.config(shape)
    found = estimate(loading, adapter, training, config=config, sequence_length=case.tokens, on_gpu=True, padded=False)
    return found.gradients + found.activations + found.logits


def make_states(model: torch.nn.Module, way: Way) -> torch.optim.Optimizer:
    """An optimizer that has its states, with nothing learned yet."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = way.optimizer(trained)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return optimizer


def measure(
    model: torch.nn.Module, label: str, shape: random_llama.Shape, case: Case, name: str, *, residents: bool
) -> Row | None:
    """One update."""
    gc.collect()
    train.watch_memory()  # graphs of an earlier way are gone with it
    of_others = train.recorded_mib()
    way = Way(name)
    way.enter(model)
    optimizer = make_states(model, way)
    gc.collect()
    on_gpu = DEVICE.type == "cuda"
    static = torch.cuda.memory_allocated() if on_gpu else 0
    if case.batch * case.tokens <= RECORDED_ROWS:
        for _ in range(_UPDATES_BEFORE):  # until blocks are recorded as graphs, if they are
            train.update(model, way, case, shape.vocabulary, 0)
        model.zero_grad(set_to_none=True)
    train.limit(case.cap)
    gc.collect()
    train.watch_memory()
    if residents and on_gpu:
        torch.cuda.memory._record_memory_history(max_entries=400000, stacks="python")
    try:
        start = time.perf_counter()
        train.update(model, way, case, shape.vocabulary, 0)
        optimizer.step()
        train.synchronize()
        seconds = time.perf_counter() - start
    except (RuntimeError, UnslothError) as error:  # out of memory among others
        print(f"{label} {case} {name}: {type(error).__name__}: {str(error)[:400]}", flush=True)
        return None
    finally:
        trace = torch.cuda.memory._snapshot()["device_traces"][0] if residents and on_gpu else []
        if residents and on_gpu:
            torch.cuda.memory._record_memory_history(enabled=None)
        peaks = train.peaks()
        recorded = train.recorded_mib() - of_others
        train.limit(0)
        del optimizer
        train.clean(model)
        way.leave(model)
    over = peaks["allocated_mib"] + recorded - static / 2**20
    expected = estimated(shape, case, way) / 2**20
    row = Row(label, shape.layers, str(case), name, seconds, static / 2**20, peaks["allocated_mib"],
              peaks["reserved_mib"], over, expected, 100 * (expected / over - 1) if over else 0.0)  # fmt: skip
    print(
        f"{label} {shape.layers} layers {case} {name}: {seconds:.1f} s, peak {row.peak_mib / 1024:.2f} GiB"
        f" ({row.reserved_mib / 1024:.2f} reserved), static {row.static_mib / 1024:.2f}, over {over / 1024:.3f},"
        f" estimated {expected / 1024:.3f} ({row.off_percent:+.1f}%)",
        flush=True,
    )
    show_residents(trace)
    return row


def show_residents(trace: list[dict[str, Any]]) -> None:
    """What was alive when most was, the largest first, with the functions of ours that made it."""
    alive: dict[int, dict[str, Any]] = {}
    now = most = 0
    at_peak: list[dict[str, Any]] = []
    for event in trace:
        if event["action"] == "alloc":
            alive[event["addr"]] = event
            now += event["size"]
        elif event["action"] == "free_completed" and event["addr"] in alive:
            now -= alive.pop(event["addr"])["size"]
        if now > most:
            most, at_peak = now, list(alive.values())
    for event in sorted(at_peak, key=lambda event: -event["size"])[:40]:
        frames = [f for f in event.get("frames", ()) if any(x in f["filename"] for x in ("unsloth", "bench", "transf"))]
        where = " < ".join(f"{f['filename'].split('/')[-1]}:{f['line']} {f['name']}" for f in frames[:4])
        print(f"    {event['size'] / 2**20:9.1f} MiB  {where}", flush=True)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="+")
    parser.add_argument("--residents", action="store_true")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no further case after these")
    parser.add_argument("--dry-run", action="store_true", help="a tiny model; writes no results")
    given = parser.parse_args()
    begin = time.perf_counter()
    grow_segments()
    model, built = None, ""
    for text in given.cases:
        if time.perf_counter() - begin > given.seconds:
            print(f"{text}: left out, no time")
            continue
        what, _, rest = text.rpartition(":")
        wanted, _, name = rest.partition("=")
        label, _, layers = (what or "8b").partition("/")
        shape = random_llama.SHAPES["tiny" if given.dry_run else label]
        shape = replace(shape, layers=int(layers)) if layers else shape
        case = Case.parse(wanted)
        if model is None or built != what:
            del model
            gc.collect()
            train.watch_memory()
            model, built = random_llama.build(shape, DEVICE, positions=2**19), what
        row = measure(model, label, shape, case, name, residents=given.residents)
        if row is not None and not given.dry_run:
            results_file.append("memory.csv", [row])


if __name__ == "__main__":
    main()
