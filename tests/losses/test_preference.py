"""Each loss against its equation, written out for one pair in Python numbers, and against TRL's own code.

Gradients are compared with central differences of the written-out equation.
"""

import math
import types
from collections import defaultdict

import pytest
import torch
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer
from trl.trainer.reward_trainer import RewardTrainer

from unsloth.core.errors import ConfigError
from unsloth.losses import preference
from unsloth.losses.preference import DPO_LOSSES, DPOOptions, Pairs, dpo_loss

CHOSEN = [-3.1, -7.5, -0.4, -12.0]
REJECTED = [-4.0, -2.2, -0.9, -30.0]
REF_CHOSEN = [-2.5, -8.0, -1.1, -9.0]
REF_REJECTED = [-4.4, -2.0, -0.8, -25.0]
LENGTHS = ([3, 9, 1, 12], [5, 2, 2, 20])


def s(x):
    return 1 / (1 + math.exp(-x))


def softened(p, e):
    return -(1 - e) * math.log(p) - e * math.log(1 - p)


def by_hand(name, c, r, rc, rr, n, m, o):
    """The loss of each pair, from probabilities rather than log-sigmoids."""
    b, e = o.beta, o.label_smoothing
    score = {
        "reverse_kl": lambda t: math.log(t),
        "forward_kl": lambda t: 1 - 1 / t,
        "js_divergence": lambda t: math.log(2 * t / (1 + t)),
        "alpha_divergence": lambda t: (t ** (o.alpha - 1) - 1) / (o.alpha - 1),
    }[o.divergence]
    w = [score(math.exp(x - y)) for x, y in zip(c, rc, strict=True)]
    lo = [score(math.exp(x - y)) for x, y in zip(r, rr, strict=True)]
    d = [x - y for x, y in zip(w, lo, strict=True)]
    per_token = [x / k - y / j for x, y, k, j in zip(w, lo, n, m, strict=True)]
    if name == "aot":
        policy = sorted(x - y for x, y in zip(c, r, strict=True))
        d = [p - q for p, q in zip(policy, sorted(x - y for x, y in zip(rc, rr, strict=True)), strict=True)]
    if name == "aot_unpaired":
        d = [x - y for x, y in zip(sorted(w), sorted(lo), strict=True)]
    if name == "sft":
        return [-sum(c) / sum(n)] * len(c)
    losses = []
    for i in range(len(c)):
        p = s(b * d[i])
        losses.append(
            {
                "sigmoid": lambda p=p: softened(p, e),
                "sigmoid_norm": lambda i=i: softened(s(b * per_token[i]), e),
                "hinge": lambda i=i: max(0.0, 1 - b * d[i]),
                "ipo": lambda i=i: (per_token[i] - 0.5 / b) ** 2,
                "exo_pair": lambda p=p: p * math.log(p / (1 - e)) + (1 - p) * math.log((1 - p) / e),
                "nca_pair": lambda i=i: -math.log(s(b * w[i])) - 0.5 * math.log((1 - s(b * w[i])) * (1 - s(b * lo[i]))),
                "robust": lambda p=p: (-(1 - e) * math.log(p) + e * math.log(1 - p)) / (1 - 2 * e),
                "bco_pair": lambda i=i: -math.log(s(b * w[i]) * (1 - s(b * lo[i]))),
                "sppo_hard": lambda i=i: (w[i] - 1 / (2 * b)) ** 2 + (lo[i] + 1 / (2 * b)) ** 2,
                "aot": lambda p=p: softened(p, e),
                "aot_unpaired": lambda p=p: softened(p, e),
                "apo_zero": lambda i=i: 1 - s(b * w[i]) + s(b * lo[i]),
                "apo_down": lambda i=i: s(b * w[i]) + 1 - s(b * (w[i] - lo[i])),
                "discopop": lambda p=p, i=i: (
                    -(1 - s(b * d[i] / o.discopop_tau)) * math.log(p)
                    + s(b * d[i] / o.discopop_tau) * math.exp(-b * d[i])
                ),
            }[name]()
        )
    return losses


def check_against(function, equation, *inputs):
    """Values and gradients of ``function`` on fp64 tensors against ``equation`` on lists of numbers."""
    tensors = [torch.tensor(values, dtype=torch.float64, requires_grad=True) for values in inputs]
    losses = function(*tensors)
    assert losses.tolist() == pytest.approx(equation(*inputs), rel=1e-10, abs=1e-12)
    losses.sum().backward()
    step = 1e-6
    for k, tensor in enumerate(tensors):
        for i in range(len(inputs[k])):
            around = []
            for sign in (1, -1):
                moved = [list(values) for values in inputs]
                moved[k][i] += sign * step
                around.append(sum(equation(*moved)))
            expected = (around[0] - around[1]) / (2 * step)
            gradient = 0.0 if tensor.grad is None else tensor.grad[i].item()
            assert gradient == pytest.approx(expected, rel=1e-5, abs=1e-7)


def options_for(**changes):
    return DPOOptions(**{"beta": 0.3, "label_smoothing": 0.1, **changes})


@pytest.mark.parametrize("name", DPO_LOSSES)
def test_dpo_losses_are_their_equations(name):
    options = options_for()

    def ours(c, r):
        constants = [torch.tensor(v, dtype=torch.float64) for v in (REF_CHOSEN, REF_REJECTED, *LENGTHS)]
        return dpo_loss(Pairs(c, r, *constants), name, options)

    check_against(ours, lambda c, r: by_hand(name, c, r, REF_CHOSEN, REF_REJECTED, *LENGTHS, options), CHOSEN, REJECTED)


@pytest.mark.parametrize("divergence", ["forward_kl", "js_divergence", "alpha_divergence"])
@pytest.mark.parametrize("name", ["sigmoid", "ipo", "exo_pair"])
def test_f_divergences_are_their_equations(name, divergence):
    options = options_for(divergence=divergence, alpha=0.4)

    def ours(c, r):
        constants = [torch.tensor(v, dtype=torch.float64) for v in (REF_CHOSEN, REF_REJECTED, *LENGTHS)]
        return dpo_loss(Pairs(c, r, *constants), name, options)

    check_against(
        ours,
        lambda c, r: by_hand(name, c, r, REF_CHOSEN, REF_REJECTED, *LENGTHS, options),
        [x + 0.2 for x in REF_CHOSEN],
        [x - 0.3 for x in REF_REJECTED],
    )


def test_alpha_divergence_tends_to_reverse_kl():
    ratio = torch.tensor([-0.3, 0.8], dtype=torch.float64)
    near = preference.divergence_score(ratio, DPOOptions(divergence="alpha_divergence", alpha=1 + 1e-7))
    torch.testing.assert_close(near, ratio)


class Everywhere:
    """The accelerator of one process."""

    device = torch.device("cpu")
    num_processes = 1

    def gather(self, x):
        return x

    gather_for_metrics = gather


def stand_in(**attributes):
    """What a trainer's loss reads of the trainer."""
    return types.SimpleNamespace(
        accelerator=Everywhere(),
        model=types.SimpleNamespace(training=True),
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        **attributes,
    )


def spread(sums, lengths, width):
    """Token log-probabilities that add up to ``sums``, after two tokens of prompt, and the completion mask."""
    per_token = torch.zeros(len(sums), width + 1)
    mask = torch.zeros(len(sums), width + 2, dtype=torch.int64)
    for i, (total, length) in enumerate(zip(sums, lengths, strict=True)):
        per_token[i, 1 : 1 + length] = total / length
        mask[i, 2 : 2 + length] = 1
    return per_token, mask


def fake_model(per_token):
    zeros = torch.zeros_like(per_token)
    outputs = types.SimpleNamespace(
        log_probs=per_token, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool(), log_sum_sq_probs=zeros
    )
    return lambda **kwargs: outputs


DEFINED = [(name, "reverse_kl") for name in DPO_LOSSES]
DEFINED += [(name, "js_divergence") for name in preference.DIVERGENCE_LOSSES]


@pytest.mark.parametrize(("name", "divergence"), DEFINED)
def test_dpo_losses_are_trls(name, divergence):
    # TRL smooths the labels of these only
    smoothing = 0.1 if name in ("robust", "exo_pair", "aot", "aot_unpaired") else 0.0
    per_token, mask = spread(CHOSEN + REJECTED, LENGTHS[0] + LENGTHS[1], 20)
    trainer = stand_in(
        beta=0.3,
        loss_types=[name],
        loss_weights=[1.0],
        ld_alpha=None,
        f_divergence_type=divergence,
        f_alpha_divergence_coef=0.5,
        label_smoothing=smoothing,
        use_weighting=False,
        args=types.SimpleNamespace(discopop_tau=0.05),
    )
    inputs = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "ref_chosen_logps": torch.tensor(REF_CHOSEN),
        "ref_rejected_logps": torch.tensor(REF_REJECTED),
    }
    theirs = DPOTrainer._compute_loss(trainer, fake_model(per_token), inputs, False)
    tensors = [torch.tensor(v) for v in (CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED, *LENGTHS)]
    ours = dpo_loss(Pairs(*tensors), name, options_for(label_smoothing=smoothing, divergence=divergence)).mean()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("sigmoyd", {}, "loss_type must be one of sigmoid"),
        ("apo_zero", {"divergence": "forward_kl"}, "f_divergence_type is not defined"),
        ("exo_pair", {"label_smoothing": 0.0}, "label_smoothing above 0"),
        ("sigmoid", {"beta": 0.0}, "beta must be positive"),
        ("sigmoid", {"label_smoothing": 0.5}, "label_smoothing must be"),
        ("sigmoid", {"divergence": "hellinger"}, "f_divergence_type must be one of"),
        ("discopop", {"discopop_tau": 0}, "discopop_tau"),
    ],
)
def test_what_makes_no_sense_is_refused(name, changes, message):
    tensors = [torch.tensor(v) for v in (CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED, *LENGTHS)]
    with pytest.raises(ConfigError, match=message):
        dpo_loss(Pairs(*tensors), name, options_for(**changes))


GOOD = [True, False, False, True]


@pytest.mark.parametrize("kl", [0.0, 0.7])
def test_kto_is_its_equation(kl):
    def equation(c):
        gains = [0.3 * (x - y - kl) for x, y in zip(c, REF_CHOSEN, strict=True)]
        return [1.2 * (1 - s(gain)) if good else 0.8 * (1 - s(-gain)) for gain, good in zip(gains, GOOD, strict=True)]

    def ours(c):
        reference = torch.tensor(REF_CHOSEN, dtype=torch.float64)
        weights = {"desirable_weight": 1.2, "undesirable_weight": 0.8}
        return preference.kto_loss(c, reference, torch.tensor(GOOD), kl, beta=0.3, **weights)

    check_against(ours, equation, CHOSEN)


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_kto_is_trls(loss_type):
    with_kl = loss_type == "kto"
    per_token, mask = spread(CHOSEN, LENGTHS[0], 20)
    kl_per_token, kl_mask = spread(REJECTED, LENGTHS[0], 20)
    trainer = stand_in(
        beta=0.3, loss_type=loss_type, calculate_KL=with_kl, desirable_weight=1.2, undesirable_weight=0.8
    )
    trainer._compute_kl_logps = lambda model, batch: kl_per_token.sum(-1) if with_kl else None
    inputs = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "ref_logps": torch.tensor(REF_CHOSEN),
        "ref_KL_logps": torch.tensor(REF_REJECTED) - 3.0,
        "label": torch.tensor(GOOD),
    }
    theirs = KTOTrainer._compute_loss(trainer, fake_model(per_token), inputs, False)
    kl = preference.kto_divergence(torch.tensor(REJECTED), inputs["ref_KL_logps"])
    assert kl > 0
    ours = preference.kto_loss(
        torch.tensor(CHOSEN),
        inputs["ref_logps"],
        inputs["label"],
        kl,
        beta=0.3,
        desirable_weight=1.2,
        undesirable_weight=0.8,
        loss_type=loss_type,
    )
    torch.testing.assert_close(ours.mean(), theirs)


def test_kto_divergence_is_never_negative_nor_differentiated():
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    kl = preference.kto_divergence(logprobs, torch.tensor([0.0, -1.0]))
    assert kl == 0 and not kl.requires_grad


def test_odds_ratio_is_its_equation_and_trls():
    def equation(c, r):
        odds = [math.exp(x) / (1 - math.exp(x)) for x in c + r]
        return [-math.log(s(math.log(a / b))) for a, b in zip(odds[: len(c)], odds[len(c) :], strict=True)]

    check_against(preference.odds_ratio_loss, equation, CHOSEN, REJECTED)
    chosen, rejected = torch.tensor(CHOSEN), torch.tensor(REJECTED)
    theirs, *_ = ORPOTrainer.odds_ratio_loss(stand_in(beta=0.1), chosen, rejected)
    torch.testing.assert_close(0.1 * preference.odds_ratio_loss(chosen, rejected), -theirs)


def test_odds_ratio_of_a_certain_answer_is_finite():
    chosen = torch.tensor([0.0, -1e-9, -200.0], requires_grad=True)
    loss = preference.odds_ratio_loss(chosen, torch.tensor([-1.0, -1e-3, 0.0]))
    loss.sum().backward()
    assert loss.isfinite().all() and chosen.grad.isfinite().all()


@pytest.mark.parametrize("alpha", [0.0, 0.25])
@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo", "simpo"])
def test_cpo_is_its_equation_and_trls(loss_type, alpha):
    settings = {"beta": 1.5, "label_smoothing": 0.1, "alpha": alpha}

    def equation(c, r):
        reward = (lambda x: (1 - math.exp(x) ** -alpha) / alpha) if alpha else (lambda x: x)
        losses = []
        for a, b in zip(c, r, strict=True):
            d = reward(a) - reward(b)
            p = s(1.5 * d - (0.5 if loss_type == "simpo" else 0.0))
            losses.append({"hinge": max(0.0, 1 - 1.5 * d), "ipo": (d - 1 / 3) ** 2}.get(loss_type, softened(p, 0.1)))
        return losses

    means = [
        [x / n for x, n in zip(v, lengths, strict=True)]
        for v, lengths in ((CHOSEN, LENGTHS[0]), (REJECTED, LENGTHS[1]))
    ]
    check_against(lambda c, r: preference.cpo_loss(c, r, loss_type, gamma=0.5, **settings), equation, *means)
    trainer = stand_in(loss_type=loss_type, simpo_gamma=0.5, **settings)
    chosen, rejected = torch.tensor(means[0]), torch.tensor(means[1])
    theirs, chosen_rewards, _ = CPOTrainer.cpo_loss(trainer, chosen, rejected)
    torch.testing.assert_close(preference.cpo_loss(chosen, rejected, loss_type, gamma=0.5, **settings), theirs)
    torch.testing.assert_close(1.5 * preference.alpha_reward(chosen, alpha), chosen_rewards)


def test_cpo_refuses_what_makes_no_sense():
    with pytest.raises(ConfigError, match="loss_type must be one of"):
        preference.cpo_loss(torch.tensor([-1.0]), torch.tensor([-2.0]), "sigmoyd")
    with pytest.raises(ConfigError, match="beta must be positive"):
        preference.cpo_loss(torch.tensor([-1.0]), torch.tensor([-2.0]), beta=0)


@pytest.mark.parametrize("with_margin", [False, True])
@pytest.mark.parametrize("center", [0.0, 0.01])
def test_reward_loss_is_its_equation_and_trls(with_margin, center):
    margin = [0.5, 0.0, 2.0, 1.0] if with_margin else [0.0] * 4

    def equation(c, r):
        return [-math.log(s(a - b - m)) + center * (a + b) ** 2 for a, b, m in zip(c, r, margin, strict=True)]

    def ours(c, r):
        given = torch.tensor(margin, dtype=c.dtype) if with_margin else None
        return preference.reward_loss(c, r, given, center_coefficient=center)

    check_against(ours, equation, CHOSEN, REJECTED)
    trainer = stand_in(args=types.SimpleNamespace(center_rewards_coefficient=center or None))
    inputs = {"attention_mask": torch.ones(8, 3)}
    if with_margin:
        inputs["margin"] = torch.tensor(margin)
    scores = types.SimpleNamespace(logits=torch.tensor(CHOSEN + REJECTED)[:, None])
    theirs = RewardTrainer.compute_loss(trainer, lambda **kwargs: scores, inputs)
    torch.testing.assert_close(ours(torch.tensor(CHOSEN), torch.tensor(REJECTED)).mean(), theirs)
