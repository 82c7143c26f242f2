"""Greedy completions are those of transformers, token for token, however they are scheduled."""

import pytest
import tiny_families
import torch

from unsloth.generate.engine import Engine
from unsloth.generate.options import EngineOptions
from unsloth.generate.sampling import SamplingParams

NEW = 14
GREEDY = SamplingParams(temperature=0, max_tokens=NEW)
SCHEDULES = {
    "plain": {"page_size": 4, "max_num_seqs": 8},
    "prompts in pieces": {"page_size": 4, "max_num_seqs": 8, "max_num_batched_tokens": 7},
    "too few pages": {"page_size": 4, "max_num_seqs": 8, "num_pages": 16, "max_num_batched_tokens": 16},
    "two rows, nothing shared": {"page_size": 3, "max_num_seqs": 2, "enable_prefix_caching": False},
}


def make_prompts() -> list[list[int]]:
    """Mixed lengths, a common beginning, and one prompt three times."""
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(3, 256, (n,), generator=generator).tolist() for n in (1, 5, 12, 17, 30)]
    return [*prompts, [*prompts[4][:20], 7, 8, 9], [*prompts[4][:20], 7, 8], prompts[3], prompts[3]]


def plain(model, prompt, new=NEW):
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
    return out[0, len(prompt) :].tolist()


def tokens(outputs):
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize("family", tiny_families.FAMILIES)
def test_every_family(family):
    model = tiny_families.build(family).eval()
    prompts = make_prompts()[:5]
    engine = Engine(model, None, EngineOptions(page_size=4, max_num_seqs=4, max_num_batched_tokens=20))
    assert tokens(engine.generate(prompts, GREEDY)) == [plain(model, prompt) for prompt in prompts]


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3"])
def test_every_schedule(family):
    model = tiny_families.build(family).eval()
    prompts = make_prompts()
    expected = [plain(model, prompt) for prompt in prompts]
    for name, options in SCHEDULES.items():
        engine = Engine(model, None, EngineOptions(**options))
        for _ in range(2):  # the second time, pages of the first are there
            assert tokens(engine.generate(prompts, GREEDY)) == expected, name
        stats = engine.stats()
        assert (stats.preemptions > 0) == (name == "too few pages")
        assert stats.running == stats.waiting == 0 and stats.free_pages == stats.pages


@pytest.mark.parametrize("precision", ["float32", "nf4"])
def test_live_adapter(precision):
    model = tiny_families.build("qwen3")
    if precision == "nf4":
        tiny_families.quantize(model)
    adapted = tiny_families.adapt(model, tiny_families.TARGETS).eval()
    prompts = make_prompts()[1:5]
    engine = Engine(adapted, None, EngineOptions(page_size=4))
    assert tokens(engine.generate(prompts, GREEDY)) == [plain(adapted, prompt) for prompt in prompts]
    with adapted.disable_adapter():
        base = [plain(adapted, prompt) for prompt in prompts]
        assert tokens(engine.generate(prompts, GREEDY)) == base
    assert tokens(engine.generate(prompts, GREEDY, lora=False)) == base
    mixed = engine.generate(prompts, GREEDY, lora=["default", False, None, False])
    live = [plain(adapted, prompt) for prompt in prompts]
    assert tokens(mixed) == [live[0], base[1], live[2], base[3]]


def test_several_adapters_in_one_batch():
    adapted = tiny_families.adapt(tiny_families.build("llama"), ["q_proj", "v_proj", "down_proj"])
    config = adapted.peft_config["default"]
    other = type(config)(r=20, lora_alpha=10, target_modules=["o_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM")
    adapted.add_adapter("other", other)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "other" in name:
                parameter.normal_(std=0.1)
    adapted.eval()
    prompts = make_prompts()[1:5]
    expected = {}
    for name in ("default", "other"):
        adapted.set_adapter(name)
        expected[name] = [plain(adapted, prompt) for prompt in prompts]
    engine = Engine(adapted, None, EngineOptions(page_size=4))
    names = ["default", "other", "other", "default"]
    outputs = engine.generate(prompts, GREEDY, lora=names)
    assert tokens(outputs) == [expected[name][i] for i, name in enumerate(names)]
    assert expected["default"] != expected["other"]
    assert [output.lora for output in outputs] == names


def test_eight_bit_weights_and_other_layers_are_called_as_modules():
    class Odd(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = tiny_families.build("llama").eval()
    old = model.model.layers[0].mlp.up_proj
    odd = Odd(old.in_features, old.out_features, bias=False)
    odd.weight = old.weight
    model.model.layers[0].mlp.up_proj = odd
    prompts = make_prompts()[:3]
    assert tokens(Engine(model).generate(prompts, GREEDY)) == [plain(model, prompt) for prompt in prompts]


def test_embeddings_in_the_place_of_tokens():
    model = tiny_families.build("gemma3").eval()  # whose embedding scales
    prompt = make_prompts()[3]
    given = torch.nn.functional.embedding(torch.tensor(prompt), model.model.embed_tokens.weight)
    engine = Engine(model, None, EngineOptions(max_num_batched_tokens=6))
    mixed = engine.generate([given, prompt], GREEDY)
    assert tokens(mixed) == [plain(model, prompt)] * 2
    assert mixed[0].prompt_token_ids == []
