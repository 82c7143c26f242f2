"""Linear cross-entropy and log-probabilities: 8,192 tokens, hidden 4,096, vocabulary 151,936, bfloat16.

The bar of the frozen head (80 ms, 6 GiB) is given as its share of the ceiling. Peers: Liger, torch.compile of the
reference, the reference itself, and the bare products without any loss.
"""

import torch
from harness import Case, compiled, device, main, peer

from unsloth.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from unsloth.kernels.logprobs import logprobs, logprobs_reference

CHUNK = 1024


def inputs(trained: bool, small: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, head weight, labels, a tenth of them ignored."""
    tokens, features, vocabulary = (8, 32, 100) if small else (8192, 4096, 151_936)
    hidden = torch.randn(tokens, features, device=device(), dtype=torch.bfloat16)
    weight = torch.randn(vocabulary, features, device=device(), dtype=torch.bfloat16) / features**0.5
    labels = torch.randint(0, vocabulary, (tokens,), device=device())
    labels[torch.rand(tokens, device=device()) < 0.1] = -100
    return hidden.requires_grad_(), weight.requires_grad_(trained), labels


def both_ways(loss, tensors):
    """Forward and backward of ``loss(*tensors)``, without accumulation into ``.grad``."""
    leaves = [t for t in tensors if t.requires_grad]

    def step():
        return torch.autograd.grad(loss(*tensors), leaves)

    return step


def liger():
    """Liger's fused loss, float32 accumulation of the weight's gradient."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    def loss(hidden, weight, labels):
        kwargs = (None, None, -100, 0.0, 0.0, "mean", None, False, torch.float32 if weight.requires_grad else None)
        return LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, labels, *kwargs)[0]

    return loss


def bare_products(hidden, weight, trained):
    """The products alone, in chunks of tokens."""
    chunk = min(CHUNK, len(hidden))
    logits = hidden.new_empty(chunk, len(weight))
    out, grad = torch.empty_like(hidden), torch.empty_like(weight) if trained else None

    def step():
        with torch.no_grad():
            for i in range(0, len(hidden), chunk):
                torch.mm(hidden[i : i + chunk], weight.t(), out=logits)
                torch.mm(logits, weight, out=out[i : i + chunk])
                if grad is not None:
                    grad.addmm_(logits.t(), hidden[i : i + chunk])

    return step


def cases(small: bool) -> list[Case]:
    """Frozen head, trained head, log-probabilities."""
    result = []
    for trained in (False, True):
        tensors = inputs(trained, small)
        flops = 2 * tensors[0].numel() * len(tensors[1])
        providers = {"ours": both_ways(linear_cross_entropy, tensors)}
        providers |= peer(lambda tensors=tensors: {"liger": both_ways(liger(), tensors)})
        providers["compiled"] = both_ways(compiled(linear_cross_entropy_reference), tensors)
        providers["reference"] = both_ways(linear_cross_entropy_reference, tensors)
        providers["bare products"] = bare_products(*tensors[:2], trained)
        products = 3 if trained else 2
        bar = products * flops / 815e12 / 80e-3 if not trained else 0.0
        name = f"{'trained' if trained else 'frozen'} head, forward+backward"
        result.append(Case("linear_ce", name, providers, flops=products * flops, bar=bar))
    tensors = inputs(False, small)
    providers = {
        "ours": both_ways(lambda *t: logprobs(*t, entropy=True).logprobs.sum(), tensors),
        "reference": both_ways(lambda *t: logprobs_reference(*t, entropy=True).logprobs.sum(), tensors),
    }
    result.append(Case("logprobs", "with entropy, forward+backward", providers, flops=2 * flops))
    return result


if __name__ == "__main__":
    main("linear_cross_entropy", cases)
