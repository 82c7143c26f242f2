"""The policy losses against their definition, written out token by token, and against TRL's own code."""

import logging
import math
import types
from collections import defaultdict

import pytest
import torch
from trl.trainer.grpo_trainer import GRPOTrainer

from unsloth.core.errors import ConfigError
from unsloth.losses import policy
from unsloth.losses.policy import PolicyOptions, group_advantages, policy_loss

LENGTHS = [5, 2, 4]
ADVANTAGES = [1.3, -0.7, 0.4]
VARIANTS = [
    {"loss_type": "grpo"},
    {"loss_type": "grpo", "beta": 0.05},
    {"loss_type": "grpo", "epsilon_high": 0.28},
    {"loss_type": "grpo", "delta": 1.4, "beta": 0.01},
    {"loss_type": "grpo", "level": "sequence", "epsilon": 3e-2, "epsilon_high": 4e-2},
    {"loss_type": "gspo", "beta": 0.05},
    {"loss_type": "bnpo"},
    {"loss_type": "bnpo", "level": "sequence", "delta": 1.5},
    {"loss_type": "dr_grpo", "max_completion_length": 16},
    {"loss_type": "dapo", "epsilon_high": 0.28},
    {"loss_type": "dapo", "beta": 0.04, "weighted_kl": True},
    {"loss_type": "gspo", "beta": 0.04, "weighted_kl": True},
]
IDS = ["-".join(str(value) for value in variant.values()) for variant in VARIANTS]


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(7)

    def draw(scale=1.0):
        return torch.randn(3, 5, generator=generator, dtype=torch.float64) * scale

    logprobs = -draw().abs() - 0.1
    mask = (torch.arange(5) < torch.tensor(LENGTHS)[:, None]).long()
    # ratios on both sides of every clip
    return types.SimpleNamespace(
        logprobs=logprobs,
        old=logprobs + draw(0.4),
        ref=logprobs + draw(0.5),
        mask=mask,
        advantages=torch.tensor(ADVANTAGES, dtype=torch.float64),
        correction=draw(0.2).exp(),
    )


def by_hand(logprobs, batch, options, num_items=None):
    """The loss, token by token, in Python numbers."""
    upper = options.epsilon if options.epsilon_high is None else options.epsilon_high
    rows = []
    for i, length in enumerate(LENGTHS):
        ratios = [math.exp(logprobs[i][t] - batch.old[i, t].item()) for t in range(length)]
        if options.level == "sequence" or options.loss_type == "gspo":
            ratios = [math.prod(ratios) ** (1 / length)] * length
        row = []
        for t, ratio in enumerate(ratios):
            a = batch.advantages[i].item()
            clipped = max(1 - options.epsilon, min(ratio, 1 + upper))
            bounded = ratio if options.delta is None else min(ratio, options.delta)
            loss = -min(bounded * a, clipped * a) * batch.correction[i, t].item()
            odds = math.exp(batch.ref[i, t].item()) / math.exp(logprobs[i][t])
            kl = (odds - math.log(odds) - 1) * (ratio if options.weighted_kl else 1)
            row.append(loss + options.beta * kl)
        rows.append(row)
    total = sum(map(sum, rows))
    if options.loss_type in ("grpo", "gspo"):
        return sum(sum(row) / len(row) for row in rows) / len(rows)
    if options.loss_type == "dr_grpo":
        return total / (len(rows) * options.max_completion_length)
    return total / (num_items if options.loss_type == "dapo" and num_items else sum(LENGTHS))


def ours(logprobs, batch, options, num_items=None):
    return policy_loss(
        logprobs,
        batch.old,
        batch.advantages,
        batch.mask,
        options,
        ref_logprobs=batch.ref,
        correction=batch.correction,
        num_items=num_items,
    )


@pytest.mark.parametrize("variant", VARIANTS, ids=IDS)
def test_losses_are_their_definition(batch, variant):
    options = PolicyOptions(**variant)
    logprobs = batch.logprobs.clone().requires_grad_()
    loss = ours(logprobs, batch, options, num_items=23).loss
    numbers = batch.logprobs.tolist()
    assert loss.item() == pytest.approx(by_hand(numbers, batch, options, 23), rel=1e-10)
    loss.backward()
    step = 1e-6
    for i in range(3):
        for t in range(5):
            around = []
            for sign in (1, -1):
                moved = [list(row) for row in numbers]
                moved[i][t] += sign * step
                around.append(by_hand(moved, batch, options, 23))
            expected = (around[0] - around[1]) / (2 * step)
            assert logprobs.grad[i, t].item() == pytest.approx(expected, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("variant", VARIANTS, ids=IDS)
def test_losses_are_trls(batch, variant):
    options = PolicyOptions(**variant)
    accelerator = types.SimpleNamespace(
        num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x, device="cpu"
    )
    trainer = types.SimpleNamespace(
        model=types.SimpleNamespace(training=True),
        accelerator=accelerator,
        args=types.SimpleNamespace(
            delta=options.delta, use_bias_correction_kl=options.weighted_kl, steps_per_generation=1
        ),
        loss_type="grpo" if options.loss_type == "gspo" else options.loss_type,
        importance_sampling_level="sequence" if options.by_sequence else "token",
        beta=options.beta,
        epsilon_low=options.epsilon,
        epsilon_high=options.upper,
        max_completion_length=options.max_completion_length,
        current_gradient_accumulation_steps=1,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=True,
        vllm_importance_sampling_correction=True,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
    )
    logprobs = batch.logprobs.clone().requires_grad_()
    trainer._get_per_token_logps_and_entropies = lambda *args, **kwargs: (logprobs, torch.zeros(3, 5), None)
    inputs = {
        "prompt_ids": torch.zeros(3, 1),
        "prompt_mask": torch.ones(3, 1),
        "completion_ids": torch.zeros(3, 5),
        "completion_mask": batch.mask,
        "advantages": batch.advantages,
        "old_per_token_logps": batch.old,
        "ref_per_token_logps": batch.ref,
        "importance_sampling_ratio": batch.correction,
        "num_items_in_batch": torch.tensor(23.0),
    }
    theirs = GRPOTrainer._compute_loss(trainer, None, inputs)
    (their_gradient,) = torch.autograd.grad(theirs, logprobs)
    loss = ours(logprobs, batch, options, num_items=23)
    (gradient,) = torch.autograd.grad(loss.loss, logprobs)
    torch.testing.assert_close(loss.loss, theirs)
    torch.testing.assert_close(gradient, their_gradient)
    if options.beta:
        assert loss.kl.item() == pytest.approx(trainer._metrics["train"]["kl"][0])


def test_on_policy_ratios_are_one_and_differentiated(batch):
    logprobs = batch.logprobs.clone().requires_grad_()
    found = policy_loss(logprobs, None, batch.advantages, batch.mask)
    assert found.loss.item() == pytest.approx(-sum(ADVANTAGES) / 3)
    found.loss.backward()
    expected = -batch.advantages[:, None] / torch.tensor(LENGTHS)[:, None] / 3 * batch.mask
    torch.testing.assert_close(logprobs.grad, expected)
    assert found.clipped_low == found.clipped_high == 0 and found.kl is None


@pytest.mark.parametrize("variant", VARIANTS, ids=IDS)
@pytest.mark.parametrize("rubbish", [math.inf, -math.inf, math.nan])
def test_masked_tokens_count_for_nothing(batch, variant, rubbish):
    options = PolicyOptions(**variant)
    clean = batch.logprobs.clone().requires_grad_()
    expected = ours(clean, batch, options).loss
    expected.backward()
    hidden = batch.mask == 0
    for values in (batch.old, batch.ref, batch.correction):
        values[hidden] = rubbish
    dirty = batch.logprobs.masked_fill(hidden, rubbish).requires_grad_()
    loss = ours(dirty, batch, options).loss
    loss.backward()
    assert torch.equal(loss, expected)
    assert torch.equal(dirty.grad, clean.grad)


@pytest.mark.parametrize("variant", VARIANTS, ids=IDS)
def test_all_truncated_is_zero_with_a_warning(batch, variant, monkeypatch):
    said = []
    monkeypatch.setattr(policy.logger, "handle", said.append)
    mask = policy.without_truncated(batch.mask, torch.tensor([False] * 3))
    assert [record.levelno for record in said] == [logging.WARNING]
    assert "max_completion_length" in said[0].getMessage()
    batch.mask = mask
    logprobs = batch.logprobs.clone().requires_grad_()
    found = ours(logprobs, batch, PolicyOptions(**variant))
    found.loss.backward()
    assert found.loss == 0 and torch.equal(logprobs.grad, torch.zeros(3, 5, dtype=torch.float64))


def test_truncated_completions_are_taken_out(batch, monkeypatch):
    monkeypatch.setattr(policy.logger, "handle", lambda record: pytest.fail("warned"))
    kept = policy.without_truncated(batch.mask, torch.tensor([True, False, True]))
    assert kept.sum(-1).tolist() == [5, 0, 4]


def test_clipped_shares():
    old = torch.zeros(2, 2)
    logprobs = torch.log(torch.tensor([[1.5, 0.5], [1.5, 0.5]]))
    found = policy_loss(logprobs, old, torch.tensor([1.0, -1.0]), torch.ones(2, 2))
    assert (found.clipped_high.item(), found.clipped_low.item()) == (0.25, 0.25)


@pytest.mark.parametrize("scaling", ["group", "batch", "none"])
def test_advantages_are_their_definition(scaling):
    rewards = torch.tensor([1.0, 0.0, 0.5, 2.0, 2.0, 2.0], dtype=torch.float64)
    means = [0.5] * 3 + [2.0] * 3
    deviation = {"group": [0.5] * 3 + [0.0] * 3, "batch": [rewards.std().item()] * 6, "none": [1.0] * 6}[scaling]
    eps = 0.0 if scaling == "none" else 1e-4
    expected = [(r - m) / (d + eps) for r, m, d in zip(rewards.tolist(), means, deviation, strict=True)]
    assert group_advantages(rewards, 3, scaling).tolist() == pytest.approx(expected)


def test_unrated_completions_count_in_no_mean():
    rewards = torch.tensor([1.0, math.nan, 3.0, math.nan, math.nan, math.nan])
    advantages = group_advantages(rewards, 3)
    torch.testing.assert_close(advantages, torch.tensor([-1.0, 0, 1.0, 0, 0, 0]) / (2**0.5 + 1e-4))
    assert group_advantages(torch.tensor([4.0]), 1).tolist() == [0]


def test_truncated_importance():
    train = torch.tensor([[-1.0, -1.0, -1.0, -1.0]])
    sampled = torch.tensor([[-2.0, -1.5, math.nan, -9.0]], requires_grad=True)
    mask = torch.tensor([[1, 1, 1, 0]])
    ratio = policy.truncated_importance(train, sampled, mask, cap=2.0)
    torch.testing.assert_close(ratio, torch.tensor([[2.0, math.exp(0.5), 1.0, 1.0]]))
    assert not ratio.requires_grad
    assert policy.truncated_importance(train, sampled, mask, cap=None)[0, 0].item() == pytest.approx(math.e)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "ppo"}, "loss_type must be one of grpo"),
        ({"level": "word"}, "token or sequence"),
        ({"epsilon": 1.0}, "epsilon must be"),
        ({"epsilon_high": -0.1}, "epsilon_high"),
        ({"delta": 1.1}, "delta must be above"),
        ({"beta": -1}, "beta must not be negative"),
        ({"loss_type": "dr_grpo"}, "max_completion_length"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        PolicyOptions(**options)


def test_missing_reference_and_uneven_groups_are_refused(batch):
    with pytest.raises(ConfigError, match="ref_logprobs"):
        policy_loss(batch.logprobs, None, batch.advantages, batch.mask, PolicyOptions(beta=0.1))
    with pytest.raises(ConfigError, match="whole groups"):
        group_advantages(torch.ones(5), 2)
    with pytest.raises(ConfigError, match="scale_rewards"):
        group_advantages(torch.ones(4), 2, "std")
