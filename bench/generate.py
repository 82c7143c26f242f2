"""Generation on a model of random weights with a live adapter: correctness against transformers, then tokens a second.

Ragged prompts of 256 tokens on average and 256 new ones, sampled, ends of sequences ignored; wall time, prefill
included. First the log-probabilities of what was generated are compared with those of the same tokens in transformers'
forward, and captured steps with steps that are not. Prints a table and appends a line a case to
bench/results/generate.csv.

    python bench/generate.py [--shape 8b] [--precision nf4 bf16] [--batches 1 32 128] [--profile 32] [--no-graphs]
"""

from __future__ import annotations

import argparse
import csv
import datetime
import gc
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import random_llama
import torch

from unsloth.generate.engine import Engine
from unsloth.generate.options import EngineOptions
from unsloth.generate.sampling import SamplingParams

RESULTS = Path(__file__).parent / "results"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def wait() -> None:
    """Until the device has done what it was given."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def timed(function: Callable[[], object]) -> tuple[float, object]:
    """Seconds, and the result."""
    wait()
    start = time.perf_counter()
    result = function()
    wait()
    return time.perf_counter() - start, result


def make_prompts(count: int, mean: int, vocabulary: int, seed: int) -> list[list[int]]:
    """Random prompts of half to one and a half times the mean."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(mean // 2, mean + mean // 2 + 1, (count,), generator=generator).tolist()
    if count == 1:
        lengths = [mean]
    return [torch.randint(0, vocabulary, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def compare(model: torch.nn.Module, engine: Engine, args: argparse.Namespace) -> None:
    """Log-probabilities of generated tokens in the engine and in transformers' forward; with graphs and without."""
    vocabulary = model.config.vocab_size
    prompts = make_prompts(8, min(64, args.prompt), vocabulary, 5)
    params = SamplingParams(temperature=0, max_tokens=min(32, args.new), ignore_eos=True, detokenize=False)
    outputs = engine.generate(prompts, params)
    again = engine.generate(prompts, params)
    same = sum(a.outputs[0].token_ids == b.outputs[0].token_ids for a, b in zip(outputs, again, strict=True))
    differences, agree, total = [], 0, 0
    model.eval()
    for prompt, output in zip(prompts, outputs, strict=True):
        tokens = output.outputs[0].token_ids
        ids = torch.tensor([prompt + tokens], device=DEVICE)
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        plain = logits.log_softmax(-1)
        picked = torch.tensor(tokens, device=DEVICE)
        own = torch.tensor(output.outputs[0].model_logprobs, device=DEVICE)
        differences.append((plain.gather(1, picked[:, None])[:, 0] - own).abs())
        agree += int((logits.argmax(-1) == picked).sum())
        total += len(tokens)
    error = torch.cat(differences)
    print(f"  greedy again: {same} of {len(prompts)} equal; argmax of transformers: {agree} of {total}")
    print(f"  log-probability, engine against forward: mean {error.mean():.5f}, largest {error.max():.5f}", flush=True)


def throughput(engine: Engine, batch: int, args: argparse.Namespace) -> dict:
    """Tokens a second of whole generations; the first, which compiles and captures, apart."""
    vocabulary = args.vocabulary
    params = SamplingParams(temperature=1.0, max_tokens=args.new, ignore_eos=True, detokenize=False, seed=1)
    first, _ = timed(lambda: engine.generate(make_prompts(batch, args.prompt, vocabulary, 100), params))
    seconds = []
    for seed in range(args.repeat):
        prompts = make_prompts(batch, args.prompt, vocabulary, seed)
        seconds.append(timed(lambda prompts=prompts: engine.generate(prompts, params))[0])
    one = SamplingParams(temperature=1.0, max_tokens=1, ignore_eos=True, detokenize=False, seed=1)
    prefill, _ = timed(lambda: engine.generate(make_prompts(batch, args.prompt, vocabulary, 200), one))
    middle = statistics.median(seconds)
    return {
        "batch": batch,
        "tokens_per_second": round(batch * args.new / middle, 1),
        "seconds": round(middle, 3),
        "first_seconds": round(first, 2),
        "prefill_seconds": round(prefill, 3),
        "step_ms": round((middle - prefill) / (args.new - 1) * 1e3, 3),
    }


def prefill(engine: Engine, args: argparse.Namespace) -> None:
    """Tokens a second of prompts alone, 8 of 2,048 tokens."""
    one = SamplingParams(temperature=1.0, max_tokens=1, ignore_eos=True, detokenize=False, seed=1)
    seconds = []
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        prompts = [torch.randint(0, args.vocabulary, (2048,), generator=generator).tolist() for _ in range(8)]
        seconds.append(timed(lambda prompts=prompts: engine.generate(prompts, one))[0])
    print(f"  prefill 8 x 2,048: {8 * 2048 / statistics.median(seconds[1:]):,.0f} tokens/s", flush=True)


def profile(engine: Engine, batch: int, args: argparse.Namespace) -> None:
    """Kernel time of some decoding steps, by kernel."""
    params = SamplingParams(temperature=1.0, max_tokens=24, ignore_eos=True, detokenize=False, seed=1)
    for prompt in make_prompts(batch, args.prompt, args.vocabulary, 7):
        engine.add_request(prompt, params)
    for _ in range(8):
        engine.step()
    wait()
    steps = 4
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
        start = time.perf_counter()
        for _ in range(steps):
            engine.step()
        wait()
        wall = time.perf_counter() - start
    while engine.has_unfinished():
        engine.step()
    times: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for event in recorded.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            times[event.name] += event.device_time / steps
            counts[event.name] += 1
    total = sum(times.values())
    print(f"  one step at batch {batch}: {wall / steps * 1e3:.2f} ms, kernels {total / 1e3:.2f} ms")
    for name, micros in times.most_common(18):
        print(f"    {micros:8.1f} us {counts[name] / steps:6.1f} x  {name[:100]}")


def switches(model: torch.nn.Module, engine: Engine, args: argparse.Namespace) -> None:
    """What a change between training and generation costs, cache given back in between or not."""
    prompts = make_prompts(8, args.prompt, args.vocabulary, 9)
    params = SamplingParams(temperature=1.0, max_tokens=8, ignore_eos=True, detokenize=False, seed=1)
    adapters = [p for n, p in model.named_parameters() if "lora_" in n]
    engine.generate(prompts, params)
    engine.generate(prompts, params)
    for name, standby in (("cache kept", False), ("cache given back", True)):
        seconds, memory, graphs = [], [], engine.stats().graphs
        for _ in range(6):
            with torch.no_grad():
                torch._foreach_mul_(adapters, 1.0)
            if standby:
                engine.sleep()
            elapsed, _ = timed(lambda: engine.generate(prompts, params))
            seconds.append(elapsed)
            memory.append(torch.cuda.memory_reserved() if DEVICE.type == "cuda" else 0)
        held = engine.stats().graphs
        print(
            f"  8 prompts, 8 tokens after a change of the adapter, {name}: {[round(s, 4) for s in seconds]} s; "
            f"graphs {graphs} before, {held} after; reserved {memory[0] >> 20} to {memory[-1] >> 20} MiB",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="8b", choices=random_llama.SHAPES)
    parser.add_argument("--precision", nargs="+", default=["nf4", "bf16"], choices=["nf4", "bf16"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32, 128])
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--profile", nargs="*", type=int, default=[])
    parser.add_argument("--no-graphs", action="store_true")
    args = parser.parse_args()
    shape = random_llama.SHAPES[args.shape]
    args.vocabulary = shape.vocabulary
    RESULTS.mkdir(exist_ok=True)
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
    for precision in args.precision:
        made, model = timed(lambda p=precision: random_llama.build(shape, DEVICE, quantized=p == "nf4", positions=4096))
        longest = max(2 * args.prompt + args.new, 2112 if DEVICE.type == "cuda" else 0)
        options = EngineOptions(
            max_model_len=longest, max_num_seqs=max(args.batches), gpu_memory_utilization=0.8, graphs=not args.no_graphs
        )
        engine = Engine(model, None, options)
        print(f"{args.shape} {precision} on {name}, torch {torch.__version__}, made in {made:.1f} s", flush=True)
        compare(model, engine, args)
        for batch in args.batches:
            row = throughput(engine, batch, args)
            print("  " + ", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
            row = {"date": datetime.date.today().isoformat(), "gpu": name, "torch": torch.__version__} | row
            row |= {"shape": args.shape, "precision": precision, "graphs": not args.no_graphs}
            path = RESULTS / "generate.csv"
            new = not path.exists()
            with path.open("a", newline="") as file:
                writer = csv.DictWriter(file, list(row))
                if new:
                    writer.writeheader()
                writer.writerow(row)
        if DEVICE.type == "cuda":
            prefill(engine, args)
        switches(model, engine, args)
        for batch in args.profile if DEVICE.type == "cuda" else []:
            profile(engine, batch, args)
        engine.shutdown()
        del engine, model
        gc.collect()
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
