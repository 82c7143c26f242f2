"""Known tokens in one flat batch, padded as for a captured graph or not."""

import pytest
import tiny_families
import torch

from unsloth.generate import adapter_bank
from unsloth.generate.engine import Engine
from unsloth.generate.known_tokens import SIZES, KnownTokensBuffer
from unsloth.generate.options import EngineOptions
from unsloth.generate.sampling import SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
PROMPTS = [[5, 6, 7], list(range(20, 50)), [100] * 9, list(range(20, 41))]


def tokens(outputs):
    return [output.outputs[0].token_ids for output in outputs]


def padding(engine):
    """The engine, its batches padded as on a GPU; returns the sizes that they come to have."""
    sizes = []
    buffer = KnownTokensBuffer(engine.options.page_size, torch.device("cpu"), pads=True)
    send = buffer.send

    def watched(*arguments):
        batch = send(*arguments)
        sizes.append((batch.padded, batch.ids.shape[0]))
        return batch

    buffer.send = watched
    engine._runner._known = buffer
    return sizes


@pytest.mark.parametrize("options", [{}, {"max_num_batched_tokens": 7}, {"num_pages": 24}])
def test_padding_changes_nothing(make_engine, options):
    expected = tokens(make_engine(**options).generate(PROMPTS, GREEDY))
    engine = make_engine(**options)
    sizes = padding(engine)
    for _ in range(2):
        assert tokens(engine.generate(PROMPTS, GREEDY)) == expected
    assert sizes and all(padded in SIZES and padded == count for padded, count in sizes)


def test_embeddings_and_too_many_short_prompts_are_not_padded(make_engine, model):
    engine = make_engine()
    sizes = padding(engine)
    given = torch.nn.functional.embedding(torch.tensor(PROMPTS[1]), model.model.embed_tokens.weight)
    assert tokens(engine.generate(given, GREEDY)) == tokens(engine.generate(PROMPTS[1], GREEDY))
    assert sizes[0] == (None, 30)
    engine.generate([[i] for i in range(3, 11)], GREEDY)  # eight tiles for eight tokens
    assert sizes[-1][0] is None or sizes[-1][0] > 16


def test_four_bits_in_bfloat16_with_an_adapter():
    model = tiny_families.build("llama").bfloat16()
    tiny_families.quantize(model)
    adapted = tiny_families.adapt(model, tiny_families.TARGETS).eval()
    assert [len(row) for row in tokens(Engine(adapted).generate(PROMPTS, GREEDY))] == [6] * 4


def test_adapters_join_the_products_of_four_bit_weights(monkeypatch):
    """On a GPU with few rows; here the kernels' reference is computed at the same place."""
    model = tiny_families.build("qwen2")  # whose projections have biases
    tiny_families.quantize(model)
    adapted = tiny_families.adapt(model, tiny_families.TARGETS).eval()
    expected = tokens(Engine(adapted, None, EngineOptions(page_size=4, fast=False)).generate(PROMPTS, GREEDY))
    engine = Engine(adapted, None, EngineOptions(page_size=4))
    calls = []

    def few(x, weights, adapters, mask):
        if adapters is not None:
            calls.append(mask is not None)
        return "some kernel"

    monkeypatch.setattr(adapter_bank, "joined_product", few)
    assert tokens(engine.generate(PROMPTS, GREEDY)) == expected
    assert calls and not any(calls)
    calls.clear()
    plain = Engine(adapted, None, EngineOptions(page_size=4, fast=False))
    some = [None, False, None, None]  # rows of several kinds
    assert tokens(engine.generate(PROMPTS, GREEDY, lora=some)) == tokens(plain.generate(PROMPTS, GREEDY, lora=some))
    assert any(calls)
    calls.clear()
    engine.generate(PROMPTS, GREEDY, lora=False)
    assert not calls
