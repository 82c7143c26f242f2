"""Generation on a model of random weights with a live adapter: correctness against transformers, then tokens a second.

Ragged prompts of 256 tokens on average and 256 new ones, sampled, ends of sequences ignored; wall time, prefill
included. First the log-probabilities of what was generated are compared with those of the same tokens in transformers'
forward, and captured steps with steps that are not. Prints a table and appends a line a case to
bench/results/generate.csv.

    python bench/generate.py [--shape 8b] [--precision nf4 bf16] [--batches 1 32 128] [--profile 32] [--switches 100]
                             [--profile-prefill] [--training-forward] [--no-graphs] [--no-comparison]
"""

from __future__ import annotations

import argparse
import datetime
import gc
import statistics
import time
from collections import Counter
from collections.abc import Callable

import random_llama
import results_file
import torch

from unsloth.generate.engine import Engine
from unsloth.generate.options import EngineOptions
from unsloth.generate.sampling import SamplingParams
from unsloth.memory import checkpointing
from unsloth.models import record
from unsloth.models.plan import plan

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
    """Tokens a second of whole generations; the first, which compiles, apart, and the second, which captures, not."""
    vocabulary = args.vocabulary
    params = SamplingParams(temperature=1.0, max_tokens=args.new, ignore_eos=True, detokenize=False, seed=1)
    first, _ = timed(lambda: engine.generate(make_prompts(batch, args.prompt, vocabulary, 100), params))
    engine.generate(make_prompts(batch, args.prompt, vocabulary, 101), params)
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


def long_prompts(seed: int, args: argparse.Namespace) -> list[list[int]]:
    """8 of 2,048 tokens, or of 48 on a CPU."""
    generator = torch.Generator().manual_seed(seed)
    length = 2048 if DEVICE.type == "cuda" else 48
    return [torch.randint(0, args.vocabulary, (length,), generator=generator).tolist() for _ in range(8)]


def prefill(model: torch.nn.Module, engine: Engine, args: argparse.Namespace) -> None:
    """Tokens a second of prompts alone, beside the forward pass of training on the same shape."""
    one = SamplingParams(temperature=1.0, max_tokens=1, ignore_eos=True, detokenize=False, seed=1)
    seconds = [timed(lambda s=seed: engine.generate(long_prompts(s, args), one))[0] for seed in range(4)]
    ids = torch.tensor(long_prompts(0, args), device=DEVICE)
    ours = ids.numel() / statistics.median(seconds[1:])
    print(f"  prefill {ids.shape[0]} x {ids.shape[1]:,}: {ours:,.0f} tokens/s", flush=True)
    if args.training_forward:
        forward = ids.numel() / training_forward(model, ids)
        print(f"  the forward pass of training: {forward:,.0f} tokens/s; prefill is {ours / forward:.0%} of it")


def training_forward(model: torch.nn.Module, ids: torch.Tensor) -> float:
    """Seconds of the blocks' forward pass with our layers, recomputing in the backward pass, two rows at a time."""
    inner = record.transformers_model(model)
    made = plan(model, attention=True)
    made.apply()
    checkpointing.apply(inner, True)
    model.train()

    def forward() -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            for rows in ids.split(2):
                inner.model(input_ids=rows, use_cache=False)

    seconds = [timed(forward)[0] for _ in range(4)]
    checkpointing.apply(inner, False)
    made.undo()
    model.eval()
    return statistics.median(seconds[1:])


def profile_decoding(engine: Engine, batch: int, args: argparse.Namespace) -> None:
    """Kernel time of some decoding steps, by kernel."""
    params = SamplingParams(temperature=1.0, max_tokens=24, ignore_eos=True, detokenize=False, seed=1)
    for prompt in make_prompts(batch, args.prompt, args.vocabulary, 7):
        engine.add_request(prompt, params)
    for _ in range(8):
        engine.step()
    profile(engine.step, 4, f"one step at batch {batch}")
    while engine.has_unfinished():
        engine.step()


def profile_prefill(engine: Engine, args: argparse.Namespace) -> None:
    """Kernel time of long prompts, by kernel."""
    one = SamplingParams(max_tokens=1, ignore_eos=True, detokenize=False)
    profile(lambda: engine.generate(long_prompts(11, args), one), 1, "prefill")


def profile(function: Callable[[], object], times: int, name: str) -> None:
    """Kernel time of a function, by kernel."""
    wait()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
        wall, _ = timed(lambda: [function() for _ in range(times)])
    micros: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for event in recorded.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            micros[event.name] += event.device_time / times
            counts[event.name] += 1
    total = sum(micros.values())
    print(f"  {name}: {wall / times * 1e3:.2f} ms, kernels {total / 1e3:.2f} ms in {sum(counts.values()) / times:.0f}")
    for kernel, each in micros.most_common(18):
        print(f"    {each:8.1f} us {counts[kernel] / times:6.1f} x  {kernel[:100]}")


def switches(model: torch.nn.Module, engine: Engine, args: argparse.Namespace) -> None:
    """Training steps with generations between them: what a change from one to the other and back costs.

    A generation after a step of training, with the cache taken again before it and given back after it, against the
    same generation when nothing has changed.
    """
    prompts = make_prompts(8, args.prompt, args.vocabulary, 9)
    params = SamplingParams(temperature=1.0, max_tokens=8, ignore_eos=True, detokenize=False, seed=1)
    adapters = [p for n, p in model.named_parameters() if "lora_" in n]
    ids = torch.randint(0, args.vocabulary, (1, 64), device=DEVICE)

    def train() -> None:
        model.train()
        with torch.autocast(DEVICE.type, torch.bfloat16):
            model(input_ids=ids, labels=ids).loss.backward()
        with torch.no_grad():
            torch._foreach_add_(adapters, [p.grad for p in adapters], alpha=-1e-4)
        model.zero_grad(set_to_none=True)
        model.eval()

    def produce() -> None:
        engine.generate(prompts, params)

    def turn() -> None:
        produce()
        engine.sleep()

    for _ in range(3):
        produce()
    alone = statistics.median(timed(produce)[0] for _ in range(10))
    seconds, reserved, graphs = [], [], engine.stats().graphs
    for _ in range(args.switches):
        train()
        seconds.append(timed(turn)[0] - alone)
        reserved.append(torch.cuda.memory_reserved() >> 20 if DEVICE.type == "cuda" else 0)
    held = engine.stats()
    print(
        f"  {args.switches} changes of training to generation and back: median {statistics.median(seconds):.4f} s, "
        f"longest {max(seconds):.4f} s, beside {alone:.4f} s of generation; graphs {graphs} before, {held.graphs} "
        f"after, {held.graph_seconds:.1f} s of capturing in all; reserved by torch after the third "
        f"{reserved[min(2, len(reserved) - 1)]} MiB, after the last {reserved[-1]} MiB",
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
    parser.add_argument("--profile-prefill", action="store_true")
    parser.add_argument("--training-forward", action="store_true", help="compare prefill with it")
    parser.add_argument("--switches", type=int, default=0)
    parser.add_argument("--no-graphs", action="store_true")
    parser.add_argument("--no-comparison", action="store_true", help="speed only")
    args = parser.parse_args()
    shape = random_llama.SHAPES[args.shape]
    args.vocabulary = shape.vocabulary
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
    for precision in args.precision:
        made, model = timed(lambda p=precision: random_llama.build(shape, DEVICE, quantized=p == "nf4", positions=4096))
        longest = max(2 * args.prompt + args.new, 2112 if DEVICE.type == "cuda" else 64)
        options = EngineOptions(
            max_model_len=longest, max_num_seqs=max(args.batches), gpu_memory_utilization=0.8, graphs=not args.no_graphs
        )
        engine = Engine(model, None, options)
        print(f"{args.shape} {precision} on {name}, torch {torch.__version__}, made in {made:.1f} s", flush=True)
        if not args.no_comparison:
            compare(model, engine, args)
        for batch in args.batches:
            row = throughput(engine, batch, args)
            print("  " + ", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
            row = {"date": datetime.date.today().isoformat(), "gpu": name, "torch": torch.__version__} | row
            row |= {"shape": args.shape, "precision": precision, "graphs": not args.no_graphs}
            results_file.append_lines(results_file.RESULTS / "generate.csv", [row])
        prefill(model, engine, args)
        held = engine.stats()
        print(f"  {held.graphs} graphs, {held.graph_seconds:.1f} s of capturing", flush=True)
        if args.switches:
            switches(model, engine, args)
        for batch in args.profile if DEVICE.type == "cuda" else []:
            profile_decoding(engine, batch, args)
        if args.profile_prefill and DEVICE.type == "cuda":
            profile_prefill(engine, args)
        engine.shutdown()
        del engine, model
        gc.collect()
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
