"""`unsloth estimate`: how much memory a run needs, and what would fit."""

from __future__ import annotations

from unsloth.cli import options, screen
from unsloth.cli.run_config import RunConfig
from unsloth.core import device
from unsloth.train import fit
from unsloth.train.estimate import format_bytes, read_config


def estimate(config: RunConfig, limit: int | None, *, trust_remote_code: bool = False) -> None:
    """Print the memory of a run, part by part, and the largest batch and row length that fit.

    Args:
        config: The run.
        limit: Bytes to fit into; None means what is free on this machine's device.
        trust_remote_code: Whether the model's repository may run code.

    Raises:
        UnslothError: The model's configuration cannot be read, or the run makes no sense.
    """
    console = screen.console()
    loading = options.load_options(config, trust_remote_code)
    plan = fit.Plan(
        loading, options.adapter_options(config, loading), options.training_options(config), read_config(loading)
    )
    memory = plan.memory()
    shape = f"{memory.batch_size} x {memory.sequence_length:,} tokens"
    parts = {name: format_bytes(size) for name, size in memory.parts().items()}
    trained = memory.static + memory.optimizer + memory.gradients + memory.activations + memory.logits
    console.print(screen.facts(f"A step of {shape}", {**parts, "together": format_bytes(trained)}))
    if memory.host:
        console.print(f"Beside it at most {format_bytes(memory.host)} of host memory, where the GPU's is shortest.")
    if memory.cache:
        sampled = memory.static + memory.optimizer + memory.cache + memory.sampling
        beside = {"keys and values": format_bytes(memory.cache), "sampling": format_bytes(memory.sampling)}
        beside["with model and optimizer"] = format_bytes(sampled)
        console.print(screen.facts("While completions are sampled", beside))
    target = device.default_device()
    where = "given" if limit is not None else f"free on {target}"
    limit = limit if limit is not None else device.free_memory(target)
    console.print("\nNot included: the libraries themselves, and memory that the allocator keeps unused.")
    if limit is None:
        console.print("How much memory is free here is unknown; give it with --memory 24GB.")
        return
    if memory.total <= limit:
        console.print(f"It fits into {format_bytes(limit)} ({where}).")
    else:
        console.print(f"It does not fit into {format_bytes(limit)} ({where}). What would help, one change at a time:\n")
        rows = [
            (knob.setting, format_bytes(knob.memory.total), "fits" if knob.memory.total <= limit else "still too much")
            for knob in fit.knobs(plan, memory)
        ]
        console.print(screen.grid("", ("change", "memory", ""), rows))
    batch, length = fit.largest_batch(plan, limit, memory), fit.largest_length(plan, limit, memory)
    console.print(f"\nLargest batch with rows of {memory.sequence_length:,} tokens: {batch or 'none fits'}")
    console.print(f"Longest rows with a batch of {memory.batch_size}: {f'{length:,} tokens' if length else 'none fit'}")
