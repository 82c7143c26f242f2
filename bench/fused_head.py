"""Output head and loss of SmolLM2-135M on the CPU, 1 x 2,048 tokens: peak memory and time, with and without fusing.

Each case runs in a process of its own, in which freed memory goes back at once, so that the peak is what is in use.
``head``: from hidden states to their gradient, frozen head. ``step``: forward and backward of the whole model with a
LoRA adapter and activation checkpointing. Prints one line a case: seconds (the best of the repetitions) and MB above
what was there before.
"""

import argparse
import re
import subprocess
import sys
import time

import torch

from unsloth import FastLanguageModel
from unsloth.core import settings
from unsloth.losses import sft
from unsloth.memory.allocator import freed_at_once

TOKENS, HIDDEN, VOCABULARY = 2048, 576, 49_152
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def resident(field):
    """Bytes of ``VmRSS`` (now) or ``VmHWM`` (peak since it was reset)."""
    with open("/proc/self/status") as file:
        return int(re.search(rf"{field}:\s+(\d+)", file.read()).group(1)) * 1024


def head_case(dtype, variant, chunk_bytes, masked):
    """A function that computes the loss of random hidden states, and their gradient."""
    hidden = torch.randn(1, TOKENS, HIDDEN).to(dtype).requires_grad_()
    weight = (torch.randn(VOCABULARY, HIDDEN) / HIDDEN**0.5).to(dtype)
    labels = torch.randint(0, VOCABULARY, (1, TOKENS))
    labels[:, : int(masked * TOKENS)] = -100

    def plain():
        from transformers.loss.loss_utils import ForCausalLMLoss

        logits = torch.nn.functional.linear(hidden, weight)
        loss = ForCausalLMLoss(logits, labels, VOCABULARY)
        return torch.autograd.grad(loss, hidden)

    def fused():
        return torch.autograd.grad(sft.causal_lm_loss(hidden, weight, labels, chunk_bytes=chunk_bytes).loss, hidden)

    return fused if variant == "fused" else plain


def step_case(dtype, variant, masked):
    """A function that runs forward and backward of the adapted model."""
    model, _ = FastLanguageModel.from_pretrained(
        "embedded:SmolLM2-135M-Instruct", dtype=dtype, load_in_16bit=True, fused_head=variant == "fused"
    )
    model = FastLanguageModel.get_peft_model(model).train()
    ids = torch.randint(0, VOCABULARY, (1, TOKENS))
    labels = ids.clone()
    labels[:, : int(masked * TOKENS)] = -100

    def step():
        model.zero_grad()
        model(input_ids=ids, labels=labels, use_cache=False).loss.backward()

    return step


def measure(args):
    """Run one case in this process."""
    torch.manual_seed(0)
    dtype = DTYPES[args.dtype]
    with freed_at_once():
        if args.case == "head":
            function = head_case(dtype, args.variant, args.chunk_bytes, args.masked)
        else:
            function = step_case(dtype, args.variant, args.masked)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        before, seconds = resident("VmRSS"), []
        for _ in range(args.repetitions):
            start = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - start)
        peak = resident("VmHWM") - before
    name = f"{args.case:5} {args.dtype:9} {args.variant:6} masked {args.masked:.0%}"
    print(f"{name}: {min(seconds):6.2f} s {peak / 1e6:6.0f} MB")


def main():
    """All cases, or the one that the arguments name."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=["head", "step"])
    parser.add_argument("--dtype", choices=DTYPES)
    parser.add_argument("--variant", choices=["fused", "plain"])
    parser.add_argument("--masked", type=float, default=0.0)
    parser.add_argument("--chunk-bytes", type=int, default=None)
    parser.add_argument("--repetitions", type=int, default=3)
    args = parser.parse_args()
    if args.case:
        return measure(args)
    settings.share_processors_politely()
    # Few CPUs multiply bfloat16 numbers; on the others torch's own product takes minutes, so those cases are left out.
    cases = [("head", "float32", "plain"), ("head", "float32", "fused"), ("head", "bfloat16", "fused")]
    cases += [("step", "float32", "plain"), ("step", "float32", "fused")]
    for case, dtype, variant in cases:
        for masked in ("0", "0.75"):
            options = ["--case", case, "--dtype", dtype, "--variant", variant, "--masked", masked]
            subprocess.run([sys.executable, __file__, *options], check=True)


if __name__ == "__main__":
    main()
