"""Timing of one operation and its peers in one process, against ceilings measured in the same process.

A bench builds :class:`Case` objects and hands them to :func:`run`. Times are medians over CUDA events. Before every
repetition the GPU is kept busy for about 2 ms, so that Python's launch overhead stays outside the interval, and L2
is overwritten, so that inputs come from device memory. The overwriting leaves L2 full of lines still to be written
back. An operation that writes as much as that leaves as many behind, so the account is even; one that hardly writes
would pay for lines that are not its own, so such a case (``reads_only``) has L2 filled by reading instead.
"""

from __future__ import annotations

import csv
import datetime
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import triton

RESULTS = Path(__file__).parents[1] / "results"
_SLEEP_CYCLES = 4_000_000  # about 2 ms at 1.9 GHz
_FLUSH_BYTES = 256 * 2**20
_SECONDS = 0.5  # of repetitions of one provider, if that is 7 at least


@dataclass(frozen=True)
class Ceilings:
    """What this GPU does at best: bytes per second of a large copy, FLOP/s of a large matrix product."""

    copy_gbps: float
    matmul_tflops: float


@dataclass(frozen=True)
class Case:
    """One measured situation.

    Attributes:
        op: Name of the operation, the kernel file's name ("rms_norm").
        name: What is measured ("forward 8192x4096 bf16").
        providers: Callables by provider name; "ours" first, then the peers. A provider that raises is reported.
        bytes: Fewest bytes through device memory: each input read once, each output written once.
        flops: Floating-point operations of matrix products, 0 for memory-bound operations.
        bar: Least share of the ceiling that counts as passing, 0 for none.
        reads_only: Whether next to nothing is written, see the top of this file.
    """

    op: str
    name: str
    providers: dict[str, Callable[[], object]]
    bytes: int = 0
    flops: int = 0
    bar: float = 0.0
    reads_only: bool = False


@dataclass(frozen=True)
class Row:
    """One line of a results file."""

    op: str
    case: str
    provider: str
    ms: float
    gbps: float
    tflops: float
    share_of_ceiling: float
    bar: float
    peak_mib: float
    note: str = ""
    gpu: str = field(default_factory=lambda: torch.cuda.get_device_name())
    torch: str = torch.__version__
    triton: str = triton.__version__
    date: str = field(default_factory=lambda: datetime.date.today().isoformat())


def median_ms(fn: Callable[[], object], repetitions: int = 40, warmup: int = 5, reads_only: bool = False) -> float:
    """Median GPU time of ``fn`` in milliseconds, with a cold L2 and launches queued ahead.

    What takes long is repeated less often, 7 times at least.
    """
    flush = torch.zeros(_FLUSH_BYTES // 4, device="cuda")
    fn()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    fn()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    repetitions = max(7, min(repetitions, int(_SECONDS / seconds)))
    for _ in range(min(warmup, repetitions) - 2):
        fn()
    torch.cuda.synchronize()
    pairs = []
    for _ in range(repetitions):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(_SLEEP_CYCLES)
        flush.max() if reads_only else flush.zero_()
        start.record()
        fn()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairs)


def measure_ceilings() -> Ceilings:
    """Copy bandwidth (read + written) over 1 GiB, and an 8192-cubed bfloat16 product on random data."""
    source = torch.randn(2**29, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    copy = median_ms(lambda: target.copy_(source), 20)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    matmul = median_ms(lambda: a @ b, 20)
    return Ceilings(2 * source.nbytes / copy / 1e6, 2 * 8192**3 / matmul / 1e9)


def run(cases: Sequence[Case], ceilings: Ceilings) -> list[Row]:
    """Measure every provider of every case, print a line each, return the rows."""
    rows = []
    for case in cases:
        for provider, fn in case.providers.items():
            row = _measure(case, provider, fn, ceilings)
            rows.append(row)
            print(
                f"{row.op:14} {row.case:34} {row.provider:14} {row.ms * 1e3:9.1f} us {row.gbps:7.0f} GB/s "
                f"{row.tflops:6.1f} TF/s {row.share_of_ceiling:6.1%} {row.peak_mib:8.1f} MiB {row.note}",
                flush=True,
            )
    return rows


def _measure(case: Case, provider: str, fn: Callable[[], object], ceilings: Ceilings) -> Row:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    try:
        fn()
        torch.cuda.synchronize()
        peak = (torch.cuda.max_memory_allocated() - before) / 2**20
        ms = median_ms(fn, reads_only=case.reads_only)
    except Exception as error:  # noqa: BLE001  a peer that cannot run is a result, not a crash
        return Row(case.op, case.name, provider, *(float("nan"),) * 4, case.bar, float("nan"), f"failed: {error}"[:200])
    gbps, tflops = case.bytes / ms / 1e6, case.flops / ms / 1e9
    floor_ms = max(case.bytes / ceilings.copy_gbps / 1e6, case.flops / ceilings.matmul_tflops / 1e9)
    return Row(case.op, case.name, provider, ms, gbps, tflops, floor_ms / ms, case.bar, peak)


def write(rows: Sequence[Row], ceilings: Ceilings, name: str, folder: Path = RESULTS) -> Path:
    """Write ``rows`` with the ceilings beside them to ``folder/name.csv``."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.csv"
    with path.open("w", newline="") as handle:
        extra = {k: round(v, 1) for k, v in asdict(ceilings).items()}
        fields = [*asdict(rows[0]), *extra]
        writer = csv.DictWriter(handle, fields)
        writer.writeheader()
        for row in rows:
            values = {k: round(v, 6) if isinstance(v, float) else v for k, v in asdict(row).items()}
            writer.writerow({**values, **extra})
    return path


def main(op: str, build: Callable[[bool], Sequence[Case]]) -> None:
    """Entry point of a bench file: measure the ceilings, run the cases, write bench/results/kernels_<op>.csv.

    ``build(small)`` makes the cases, of test size where ``small``: with ``--dry-run`` each callable is only called
    once, on whatever device there is (on a CPU, set TRITON_INTERPRET=1 to run the kernels).
    """
    if "--dry-run" in sys.argv[1:]:
        for case in build(True):
            for provider, fn in case.providers.items():
                fn()
                print(f"{case.op}: {case.name}: {provider} ran")
        return
    if not torch.cuda.is_available():
        raise SystemExit(f"bench {op}: no CUDA device here; run this on a GPU machine, or pass --dry-run")
    ceilings = measure_ceilings()
    print(f"ceilings: copy {ceilings.copy_gbps:.0f} GB/s, matmul {ceilings.matmul_tflops:.0f} TFLOP/s")
    print(f"wrote {write(run(build(False), ceilings), ceilings, f'kernels_{op}')}")


def device() -> torch.device:
    """Where benches put their tensors."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def compiled(reference: Callable) -> Callable:
    """``torch.compile`` of a reference, the peer that every bench has; on the CPU the reference itself."""
    if not torch.cuda.is_available():
        return reference
    import torch._functorch.config as functorch_config

    functorch_config.donated_buffer = False  # the same graph is differentiated again and again
    return torch.compile(reference)


def backward(fn: Callable, inputs: Sequence[torch.Tensor], *extra: object) -> Callable[[], object]:
    """A callable that runs only the backward of ``fn(*inputs, *extra)``, for those inputs that require gradients."""
    outputs = fn(*inputs, *extra)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else [x for x in outputs if x is not None]
    grads = [torch.randn_like(x) for x in outputs]
    leaves = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
    return lambda: torch.autograd.grad(outputs, leaves, grads, retain_graph=True)


def graphed(step: Callable[[], object]) -> Callable[[], object]:
    """``step`` as a CUDA graph, or itself on the CPU."""
    if not torch.cuda.is_available():
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    kept = (graph, step)  # the graph reads tensors that only the step's closure holds
    return lambda: kept[0].replay()


def peer(build: Callable[[], dict[str, Callable[[], object]]]) -> dict[str, Callable[[], object]]:
    """The providers that ``build`` makes, or none where their package is not installed or needs a GPU."""
    if not torch.cuda.is_available():
        return {}
    try:
        return build()
    except ImportError as error:
        print(f"peer left out: {error}")
        return {}
