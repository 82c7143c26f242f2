"""Every causal language model class of transformers that can be built tiny: with our head and layers, plain PEFT's.

The long form goes through all of them and compares the result with docs/families-coverage.md, which
``python -m pytest tests/parity/test_generic.py -m soak --write-coverage`` writes.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import peft
import pytest
import tiny_models
import torch
import transformers

from unsloth.layers import fused_head
from unsloth.layers.lazy_logits import LazyLogits
from unsloth.models import plan

PAGE = Path(__file__).parents[2] / "docs" / "families-coverage.md"
IMPORTANT = [
    *("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text", "phi3"),
    *("granite", "smollm3", "cohere", "gpt_oss", "deepseek_v3", "glm4_moe", "falcon_h1", "llama4", "qwen3_next"),
    *("gpt2", "bart"),
]
SAMPLE = 8
LOSS, GRADIENT = 1e-6, 1e-5  # relative


@dataclass(frozen=True)
class Outcome:
    """What became of one class.

    Attributes:
        name: The class.
        built: Whether a tiny model could be built and adapted; if not, ``note`` says why.
        fused: Whether head and loss ran in one.
        layers: How many parts the plan swapped.
        equal: Whether loss and adapter gradients equal those of plain transformers and PEFT.
        note: Why the model was left alone, or what differs.
    """

    name: str
    built: bool
    fused: bool = False
    layers: int = 0
    equal: bool = False
    note: str = ""


def examine(model_type: str) -> Outcome:
    built = tiny_models.build(model_type)
    if built.model is None:
        return Outcome(built.name, False, note=built.reason)
    with tiny_models.quiet():
        try:
            adapted = adapt(built.model)
            plain = loss_and_gradients(adapted)
        except (ValueError, RuntimeError, TypeError, AttributeError) as error:
            return Outcome(built.name, False, note=f"plain PEFT fails: {str(error).splitlines()[0][:120]}")
        found = fused_head.install(built.model)
        swapped = len(plan.install(adapted).replacements)
        ours = loss_and_gradients(adapted)
        if found.applies and ours.pending is False:
            note = "its forward uses the logits itself"
        else:
            note = "" if found.applies else found.text
        difference = compare(ours, plain)
        if difference:  # the same in float64, where rounding cannot be meant
            adapted.double()
            difference = compare(loss_and_gradients(adapted), loss_without(built.model, adapted))
            note = note or ("equal in float64 only" if not difference else difference)
    return Outcome(built.name, True, ours.pending, swapped, not difference, note)


@dataclass(frozen=True)
class Result:
    loss: torch.Tensor
    gradients: dict[str, torch.Tensor]
    pending: bool


def adapt(model):
    """A LoRA adapter on every plain linear layer but the head, with a random B."""
    torch.manual_seed(0)
    head = model.get_output_embeddings()
    linear = (torch.nn.Linear, transformers.pytorch_utils.Conv1D)
    targets = [name for name, module in model.named_modules() if type(module) in linear and module is not head]
    # PEFT refuses the output projection of Mamba layers, which go round its forward.
    targets = [name for name in targets if not (name.endswith("out_proj") and beside_a_convolution(model, name))]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, lora_alpha=4))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return adapted.eval()


def beside_a_convolution(model, name):
    return hasattr(model.get_submodule(name.rpartition(".")[0]), "conv1d")


def loss_and_gradients(adapted) -> Result:
    adapted.zero_grad()
    output = tiny_models.run(adapted)
    output.loss.backward()
    logits = output.logits
    gradients = {n: p.grad.clone() for n, p in adapted.named_parameters() if p.grad is not None}
    return Result(output.loss.detach(), gradients, isinstance(logits, LazyLogits) and logits.is_pending)


def loss_without(model, adapted) -> Result:
    fused_head.remove(model)
    plan.remove(adapted)
    return loss_and_gradients(adapted)


def compare(ours: Result, plain: Result) -> str:
    """What differs, or an empty text."""
    if not torch.isfinite(plain.loss) or not plain.gradients:
        return "plain PEFT gives no finite loss, or no gradient"
    error = ((ours.loss - plain.loss).abs() / plain.loss.abs()).item()
    if error > LOSS:
        return f"loss differs by {error:.1e}"
    if ours.gradients.keys() != plain.gradients.keys():
        return "other weights get gradients"
    largest = max(g.norm() for g in plain.gradients.values())
    errors = {
        name: ((ours.gradients[name] - g).norm() / g.norm().clamp(min=1e-3 * largest)).item()
        for name, g in plain.gradients.items()
    }
    worst = max(errors, key=errors.__getitem__)
    return "" if errors[worst] <= GRADIENT else f"gradient of {worst} differs by {errors[worst]:.1e}"


def sampled() -> list[str]:
    rest = [t for t in tiny_models.model_types() if t not in IMPORTANT]
    return [*IMPORTANT, *random.Random(transformers.__version__).sample(rest, SAMPLE)]


@pytest.mark.parametrize("model_type", sampled())
def test_loss_and_gradients_equal_those_of_plain_peft(model_type):
    outcome = examine(model_type)
    if not outcome.built:
        assert model_type not in IMPORTANT, outcome
        pytest.skip(outcome.note)
    assert outcome.equal, outcome
    if model_type in IMPORTANT:
        assert outcome.fused == (model_type != "bart"), outcome
        assert outcome.layers > 0 or model_type == "gpt2", outcome  # its linear layers are Conv1D


def test_a_wrong_loss_would_be_noticed(monkeypatch):
    monkeypatch.setattr(fused_head.LazyLogits, "scale_and_cap", lambda self: (1.0, 0.0))
    assert not examine("gemma2").equal
    assert not examine("granite").equal


@pytest.mark.soak
def test_every_class_is_as_the_coverage_page_says(request):
    outcomes = [examine(model_type) for model_type in tiny_models.model_types()]
    page = render(outcomes)
    if request.config.getoption("--write-coverage"):
        PAGE.write_text(page, encoding="utf-8")
    assert [o for o in outcomes if o.built and not o.equal] == []
    if f"transformers {transformers.__version__}," in PAGE.read_text(encoding="utf-8"):
        assert PAGE.read_text(encoding="utf-8") == page


def render(outcomes: list[Outcome]) -> str:
    built = [o for o in outcomes if o.built]
    lines = [
        "# Model classes: what is swapped, and whether it is equal",
        "",
        "Every causal language model class of transformers, built tiny with random weights and a LoRA adapter on its "
        "linear layers. With the [fused head](losses.md) and the [plan](plan.md) its loss must equal that of plain "
        "transformers and PEFT within 1e-6, and every adapter gradient within 1e-5 (relative, float32; where rounding "
        "is amplified beyond that, in float64). A class whose head or loss is of another kind keeps its own; it trains "
        "all the same. The third column counts the parts that the plan swapped in a model of two to eight layers.",
        "",
        f"Generated with transformers {transformers.__version__}, PEFT {peft.__version__}: {len(outcomes)} classes, "
        f"{len(built)} of them built, {sum(o.fused for o in built)} with the fused head, "
        f"{sum(o.layers > 0 for o in built)} with swapped layers, {sum(o.equal for o in built)} equal.",
        "",
        "| class | fused head | parts swapped | equal | note |",
        "|---|---|---|---|---|",
    ]
    for o in sorted(outcomes, key=lambda o: o.name):
        results = ("yes" if o.fused else "no", o.layers, "yes" if o.equal else "no") if o.built else ("", "", "")
        note = o.note.replace("|", "/") if o.built else f"not built: {o.note.replace('|', '/')}"
        lines.append("| " + " | ".join(map(str, (o.name, *results, note))) + " |")
    return "\n".join(lines) + "\n"
