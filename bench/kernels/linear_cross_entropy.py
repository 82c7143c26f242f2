"""Linear cross-entropy and log-probabilities: 8,192 tokens, hidden 4,096, vocabulary 151,936, bfloat16.

The bar of the frozen head (80 ms, 6 GiB) is given as its share of the ceiling. Peers: Liger, torch.compile of the
reference, the reference itself, and the bare products without any loss.
"""

import torch
from harness import Case, main

from unsloth.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from unsloth.kernels.logprobs import logprobs, logprobs_reference

TOKENS, HIDDEN, VOCABULARY = 8192, 4096, 151_936
FLOPS = 2 * TOKENS * HIDDEN * VOCABULARY
CHUNK = 1024


def inputs(trained: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, head weight, labels, a tenth of them ignored."""
    hidden = torch.randn(TOKENS, HIDDEN, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(VOCABULARY, HIDDEN, device="cuda", dtype=torch.bfloat16) / HIDDEN**0.5
    labels = torch.randint(0, VOCABULARY, (TOKENS,), device="cuda")
    labels[torch.rand(TOKENS, device="cuda") < 0.1] = -100
    return hidden.requires_grad_(), weight.requires_grad_(trained), labels


def both_ways(loss, tensors):
    """Forward and backward of ``loss(*tensors)``, without accumulation into ``.grad``."""
    leaves = [t for t in tensors if t.requires_grad]

    def step():
        return torch.autograd.grad(loss(*tensors), leaves)

    return step


def liger():
    """Liger's fused loss, float32 accumulation of the weight's gradient; absent when it is not installed."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    def loss(hidden, weight, labels):
        kwargs = (None, None, -100, 0.0, 0.0, "mean", None, False, torch.float32 if weight.requires_grad else None)
        return LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, labels, *kwargs)[0]

    return loss


def bare_products(hidden, weight, trained):
    """The products alone, in chunks of tokens."""
    logits = torch.empty(CHUNK, VOCABULARY, device="cuda", dtype=torch.bfloat16)
    out, grad = torch.empty_like(hidden), torch.empty_like(weight) if trained else None

    def step():
        with torch.no_grad():
            for i in range(0, TOKENS, CHUNK):
                torch.mm(hidden[i : i + CHUNK], weight.t(), out=logits)
                torch.mm(logits, weight, out=out[i : i + CHUNK])
                if grad is not None:
                    grad.addmm_(logits.t(), hidden[i : i + CHUNK])

    return step


def build() -> list[Case]:
    """Frozen head, trained head, log-probabilities."""
    cases = []
    for trained in (False, True):
        tensors = inputs(trained)
        providers = {"ours": both_ways(linear_cross_entropy, tensors)}
        try:
            providers["liger"] = both_ways(liger(), tensors)
        except ImportError:
            pass
        providers["compiled"] = both_ways(torch.compile(linear_cross_entropy_reference), tensors)
        providers["reference"] = both_ways(linear_cross_entropy_reference, tensors)
        providers["bare products"] = bare_products(*tensors[:2], trained)
        products = 3 if trained else 2
        bar = products * FLOPS / 815e12 / 80e-3 if not trained else 0.0
        name = f"{'trained' if trained else 'frozen'} head, forward+backward"
        cases.append(Case("linear_ce", name, providers, flops=products * FLOPS, bar=bar))
    tensors = inputs(False)
    providers = {
        "ours": both_ways(lambda *t: logprobs(*t, entropy=True).logprobs.sum(), tensors),
        "reference": both_ways(lambda *t: logprobs_reference(*t, entropy=True).logprobs.sum(), tensors),
    }
    cases.append(Case("logprobs", "with entropy, forward+backward", providers, flops=2 * FLOPS))
    return cases


if __name__ == "__main__":
    main("linear_cross_entropy", build)
