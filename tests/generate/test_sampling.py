"""Sampling parameters, and the distribution they give, against transformers' logits processors."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from unsloth.core.errors import ConfigError
from unsloth.generate import sampling
from unsloth.generate.sampler import Controls, Kind, adjust, keys_of, sample
from unsloth.generate.sampling import SamplingParams
from unsloth.kernels.cut_rows import cut_rows
from unsloth.kernels.sample_rows import waiting_times

ROWS, SIZE = 6, 97


def controls(rows=ROWS, **values):
    """Neutral parameters but for what is given."""
    neutral = {"temperature": 1.0, "top_p": 1.0, "min_p": 0.0, "repetition": 1.0, "presence": 0.0, "frequency": 0.0}
    floats = {name: torch.full((rows,), float(values.pop(name, neutral[name]))) for name in neutral}
    top_k = torch.full((rows,), values.pop("top_k", 0), dtype=torch.int32)
    keys = torch.from_numpy(keys_of(np.full(rows, 11, np.uint64), np.arange(rows, dtype=np.uint64)))
    return Controls(**floats, top_k=top_k, keys=keys, **values)


def logits():
    return torch.randn(ROWS, SIZE, generator=torch.Generator().manual_seed(0)) * 4


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"), [(0, 0.8, 0), (5, 1, 0), (20, 0.5, 0), (0, 1, 0.2), (9, 0.9, 0.1)]
)
def test_cuts_leave_what_transformers_leaves(temperature, top_k, top_p, min_p):
    ids = torch.zeros(ROWS, 1, dtype=torch.long)
    chain = [TemperatureLogitsWarper(temperature)]
    chain += [TopKLogitsWarper(top_k)] if top_k else []
    chain += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    chain += [MinPLogitsWarper(min_p)] if min_p else []
    expected = LogitsProcessorList(chain)(ids, logits())
    c = controls(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    z = logits() * (1 / c.temperature)[:, None]
    bound = cut_rows(logits(), c.temperature, c.top_k, c.top_p, c.min_p)
    ours = z.masked_fill(z < bound[:, None], float("-inf"))
    assert torch.equal(ours > float("-inf"), expected > float("-inf"))
    torch.testing.assert_close(ours, expected)


def test_repetition_penalty_is_that_of_transformers():
    prompt = torch.randint(0, SIZE, (ROWS, 8), generator=torch.Generator().manual_seed(1))
    generated = torch.randint(0, SIZE, (ROWS, 5), generator=torch.Generator().manual_seed(2))
    expected = RepetitionPenaltyLogitsProcessor(1.3)(torch.cat([prompt, generated], 1), logits())
    counts = torch.zeros(ROWS, SIZE, dtype=torch.int32).scatter_add_(1, generated, torch.ones_like(generated).int())
    seen = torch.zeros(ROWS, SIZE, dtype=torch.bool).scatter_(1, prompt, True)
    c = controls(repetition=1.3, counts=counts, prompt=seen)
    torch.testing.assert_close(adjust(logits(), c, Kind(penalties=True)), expected)


def test_presence_and_frequency_count_generated_tokens_only():
    counts = torch.zeros(ROWS, SIZE, dtype=torch.int32)
    counts[:, 3], counts[:, 4] = 1, 3
    seen = torch.zeros(ROWS, SIZE, dtype=torch.bool)
    seen[:, 5] = True
    change = adjust(
        torch.zeros(ROWS, SIZE),
        controls(presence=0.5, frequency=0.25, counts=counts, prompt=seen),
        Kind(penalties=True),
    )
    assert change[0, [3, 4, 5, 6]].tolist() == [-0.75, -1.25, 0, 0]


def test_log_probabilities_of_both_distributions():
    z = logits()
    bias = torch.zeros(ROWS, SIZE)
    bias[:, 7] = 3.0
    found = sample(z, controls(temperature=0.5, top_k=3, bias=bias), Kind(cuts=True, bias=True, logprobs=4))
    rows = torch.arange(ROWS)
    kept = ((z + bias) / 0.5).topk(3)
    kept_log = kept.values.log_softmax(-1)
    place = (kept.indices == found.tokens[:, None]).int().argmax(-1)
    torch.testing.assert_close(found.sampled, kept_log[rows, place])
    torch.testing.assert_close(found.model, z.log_softmax(-1)[rows, found.tokens])
    torch.testing.assert_close(found.top_values, z.log_softmax(-1).topk(4).values)
    order = z.argsort(-1, descending=True)
    assert found.ranks.tolist() == [(order[i] == found.tokens[i]).nonzero().item() + 1 for i in range(ROWS)]


def test_greedy_rows_beside_drawn_ones():
    c = controls()
    c.temperature[::2] = 0
    found = sample(logits(), c, Kind())
    assert torch.equal(found.tokens[::2], logits().argmax(-1)[::2])
    assert found.sampled[::2].abs().max() == 0


@pytest.mark.parametrize("seed", [0, 1, 2**64 - 1])
def test_no_seed_has_a_token_that_it_always_draws(seed):
    """The first tokens of seed 0 were token 0, however unlikely."""
    numbers = np.arange(64, dtype=np.uint64)
    keys = torch.from_numpy(keys_of(np.full(64, seed, dtype=np.uint64), numbers))
    waits = waiting_times(keys, 256)
    assert waits.min() > 1e-6 and waits.mean() == pytest.approx(1, abs=0.05)


def test_a_cut_does_not_change_which_random_numbers_are_used():
    """So a request draws the same tokens whether or not others in the batch are cut."""
    plain = sample(logits(), controls(), Kind())
    cut = sample(logits(), controls(), Kind(cuts=True, bias=True))
    assert torch.equal(plain.tokens, cut.tokens)
    seeds = np.repeat(np.array([0, 1, 2**62, 2**64 - 5], np.uint64), 50)
    assert len({*zip(*keys_of(seeds, np.tile(np.arange(50, dtype=np.uint64), 4)).tolist(), strict=True)}) == 200


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"temperature": -1}, "temperature must be"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"top_p": 0}, "top_p must be"),
        ({"top_p": 1.5}, "top_p must be"),
        ({"top_k": -2}, "top_k must be"),
        ({"top_k": 2.5}, "top_k must be"),
        ({"min_p": 2}, "min_p must be"),
        ({"n": 0}, "n must be"),
        ({"n": 2, "temperature": 0}, "all the same"),
        ({"max_tokens": 0}, "max_tokens must be"),
        ({"min_tokens": 20}, "min_tokens is more"),
        ({"repetition_penalty": 0}, "repetition_penalty must be"),
        ({"presence_penalty": 3}, "presence_penalty must be"),
        ({"stop": [""]}, "none of them empty"),
        ({"stop": "x", "detokenize": False}, "need detokenize"),
        ({"stop_token_ids": [-1]}, "stop_token_ids must be"),
        ({"logit_bias": {1: float("inf")}}, "logit_bias must map"),
        ({"seed": "x"}, "seed must be"),
        ({"logprobs": -1}, "logprobs must be"),
    ],
)
def test_parameters_without_sense_are_errors(values, match):
    with pytest.raises(ConfigError, match=match):
        SamplingParams(**values)


def test_parameters_of_others_are_accepted():
    theirs = SimpleNamespace(temperature=0.5, max_tokens=7, top_k=-1, stop=["a"], min_p=0.1, prompt_logprobs=None, n=2)
    assert sampling.accept(theirs) == SamplingParams(temperature=0.5, max_tokens=7, top_k=-1, stop="a", min_p=0.1, n=2)
    assert sampling.accept({"temperature": 0}) == SamplingParams(temperature=0)
    with pytest.raises(ConfigError, match="does not know prompt_logprobs"):
        sampling.accept(SimpleNamespace(temperature=1, max_tokens=1, prompt_logprobs=3))
    with pytest.raises(ConfigError, match="unknown sampling parameters"):
        sampling.accept({"temprature": 0})
    with pytest.raises(ConfigError, match="must be SamplingParams"):
        sampling.accept(3)
