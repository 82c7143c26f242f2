"""Requests: ends, samples, seeds, log-probabilities, weights that change, and what goes wrong."""

import pytest
import tiny_families
import torch
from peft import LoraConfig, get_peft_model

from unsloth.core.errors import AdapterError, ConfigError, GenerationError
from unsloth.generate.engine import Engine
from unsloth.generate.options import EngineOptions
from unsloth.generate.sampling import SamplingParams

PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5, 4], [100] * 9, [30, 31, 32, 33]]


def drawn(**values):
    return SamplingParams(**{"temperature": 1.0, "max_tokens": 12, "ignore_eos": True, **values})


def ids(outputs):
    return [[completion.token_ids for completion in output.outputs] for output in outputs]


def test_seeds_give_the_same_tokens_in_any_company(make_engine):
    params = [drawn(seed=i, top_k=20 * (i % 2), repetition_penalty=1 + i % 3 / 5) for i in range(4)]
    alone = [make_engine().generate(prompt, own)[0] for prompt, own in zip(PROMPTS, params, strict=True)]
    for options in ({}, {"max_num_seqs": 2}, {"num_pages": 17}, {"max_num_batched_tokens": 3}):
        assert ids(make_engine(**options).generate(PROMPTS, params)) == ids(alone)
    mixed = make_engine().generate([*PROMPTS, PROMPTS[0]], [*params, drawn(temperature=0, logit_bias={3: 5.0})])
    assert ids(mixed[:4]) == ids(alone)
    others = make_engine().generate(PROMPTS, [drawn(seed=100 + i) for i in range(4)])
    assert ids(others) != ids(alone)


def test_seeds_come_from_torch_where_none_is_given(make_engine):
    torch.manual_seed(1)
    first = make_engine().generate(PROMPTS, drawn())
    torch.manual_seed(1)
    assert ids(make_engine().generate(PROMPTS, drawn())) == ids(first)
    assert ids(make_engine().generate(PROMPTS, drawn())) != ids(first)


def test_samples_of_a_prompt_share_its_pages(make_engine):
    engine = make_engine(max_num_seqs=16)
    prompt = list(range(10, 40))  # seven full pages of four, and half a page
    engine.add_request(prompt, drawn(n=6, seed=4))
    engine.step()
    stats = engine.stats()
    assert stats.running == 6 and stats.prompt_tokens == 30
    assert stats.pages - stats.free_pages == 7 + 6
    while engine.has_unfinished():
        last = engine.step()
    samples = [tuple(completion.token_ids) for completion in last[0].outputs]
    assert len(set(samples)) == 6 and [completion.index for completion in last[0].outputs] == list(range(6))
    # each sample is what its own seed gives alone
    alone = [engine.generate(prompt, drawn(seed=4 + i))[0].outputs[0].token_ids for i in range(6)]
    assert [list(sample) for sample in samples] == alone
    assert engine.stats().free_pages == engine.stats().pages


def test_more_samples_than_rows(make_engine):
    outputs = make_engine(max_num_seqs=3).generate([[5] * 9], drawn(n=10, seed=1))
    assert ids(outputs) == ids(make_engine(max_num_seqs=16).generate([[5] * 9], drawn(n=10, seed=1)))


def test_stop_tokens_and_lengths(make_engine):
    engine = make_engine()
    whole = engine.generate(PROMPTS[0], drawn(seed=0))[0].outputs[0]
    assert whole.finish_reason == "length" and whole.stop_reason is None and len(whole.token_ids) == 12
    stop = whole.token_ids[4]
    cut = engine.generate(PROMPTS[0], drawn(seed=0, stop_token_ids=[stop]))[0].outputs[0]
    first = whole.token_ids.index(stop)
    assert cut.token_ids == whole.token_ids[: first + 1] and (cut.finish_reason, cut.stop_reason) == ("stop", stop)
    late = engine.generate(PROMPTS[0], drawn(seed=0, stop_token_ids=[stop], min_tokens=9))[0].outputs[0]
    assert stop not in late.token_ids[:9] and len(late.token_ids) > 9


def test_the_models_own_end(make_engine, model, tokenizer):
    sure = {tokenizer.eos_token_id: 1e4}
    out = make_engine().generate(PROMPTS[0], SamplingParams(logit_bias=sure))[0].outputs[0]
    assert out.token_ids == [tokenizer.eos_token_id] and out.text == ""
    assert (out.finish_reason, out.stop_reason) == ("stop", None)
    late = make_engine().generate(PROMPTS[0], SamplingParams(logit_bias=sure, min_tokens=5))[0].outputs[0]
    assert len(late.token_ids) == 6 and late.token_ids[-1] == tokenizer.eos_token_id


def test_stop_texts(make_engine, tokenizer):
    engine = make_engine()
    forced = [tokenizer.convert_tokens_to_ids(c) for c in "abc"]
    params = drawn(seed=3, logit_bias={i: 50.0 for i in forced}, max_tokens=40)
    whole = engine.generate("hello", params)[0].outputs[0].text
    stop = whole[10:13]
    at = whole.index(stop)
    for keep in (False, True):
        values = {"seed": 3, "logit_bias": {i: 50.0 for i in forced}, "max_tokens": 40, "stop": stop}
        out = engine.generate("hello", drawn(**values, include_stop_str_in_output=keep))[0].outputs[0]
        assert out.text == whole[: at + 3 * keep] and (out.finish_reason, out.stop_reason) == ("stop", stop)


def test_log_probabilities(make_engine, model):
    out = make_engine().generate(PROMPTS[1], drawn(seed=2, temperature=0.7, logprobs=3))[0].outputs[0]
    full = torch.tensor([PROMPTS[1] + out.token_ids])
    with torch.no_grad():
        logits = model(full).logits[0, len(PROMPTS[1]) - 1 : -1]
    picked = torch.tensor(out.token_ids)[:, None]
    plain, heated = logits.log_softmax(-1), (logits / 0.7).log_softmax(-1)
    torch.testing.assert_close(torch.tensor(out.model_logprobs), plain.gather(1, picked)[:, 0], rtol=0, atol=1e-4)
    torch.testing.assert_close(torch.tensor(out.sampled_logprobs), heated.gather(1, picked)[:, 0], rtol=0, atol=1e-4)
    assert out.cumulative_logprob == pytest.approx(sum(out.model_logprobs))
    for i, entry in enumerate(out.logprobs):
        best = plain[i].topk(3)
        assert set(best.indices.tolist()) | {out.token_ids[i]} == set(entry)
        assert [entry[j].rank for j in best.indices.tolist()] == [1, 2, 3]
        assert entry[out.token_ids[i]].logprob == pytest.approx(out.model_logprobs[i], abs=1e-5)


def test_outputs_come_piece_by_piece(make_engine):
    engine, text, tokens = make_engine(), "", []
    for output in engine.stream("hi", drawn(seed=1)):
        text += output.outputs[0].new_text
        tokens += output.outputs[0].new_token_ids
    assert output.finished and tokens == output.outputs[0].token_ids and text == output.outputs[0].text
    for _ in engine.stream("hi", drawn(seed=1)):
        break
    assert not engine.has_unfinished() and engine.stats().aborted == 1
    assert engine.stats().free_pages == engine.stats().pages


def test_known_tokens_come_first_where_nobody_reads_along(make_engine, monkeypatch):
    engine = make_engine(max_num_batched_tokens=10, max_num_seqs=3)
    steps, launch = [], engine._runner.launch

    def record(plan):
        steps.append((sum(chunk.stop - chunk.start for chunk in plan.chunks), len(plan.decodes)))
        return launch(plan)

    monkeypatch.setattr(engine._runner, "launch", record)
    together = engine.generate(PROMPTS, drawn(seed=1, max_tokens=5))  # 3, 6, 9 and 4 tokens; three rows
    assert steps[:4] == [(9, 0), (9, 0), (0, 3), (0, 3)]  # in pieces of one size
    assert (4, 0) in steps[4:]  # the fourth as soon as there is room
    steps.clear()
    for i, prompt in enumerate(PROMPTS):
        engine.add_request(prompt, drawn(seed=1, max_tokens=5), request_id=str(i))
    outputs = {}
    while engine.has_unfinished():
        outputs |= {output.request_id: output for output in engine.step()}
    assert steps[1][1] and all(decodes for _, decodes in steps[1:4])
    assert ids(outputs[str(i)] for i in range(4)) == ids(together)


def test_who_waits_comes_in_several_at_a_time_where_nobody_reads_along(make_engine, monkeypatch):
    engine = make_engine(max_num_seqs=32)
    steps, launch = [], engine._runner.launch
    monkeypatch.setattr(engine._runner, "launch", lambda plan: steps.append(len(plan.chunks)) or launch(plan))
    prompts = [[5 + i, 6, 7] for i in range(39)]
    lengths = [drawn(seed=i, max_tokens=3 + i % 32) for i in range(39)]  # one ends after the other
    outputs = engine.generate(prompts, lengths)
    assert [len(own[0]) for own in ids(outputs)] == [params.max_tokens for params in lengths]
    first, *others = [count for count in steps if count]
    assert first == 32 and sum(others) == 7 and min(others[:-1]) >= 2


def test_abort(make_engine):
    engine = make_engine(max_num_seqs=2)
    names = [engine.add_request(prompt, drawn()) for prompt in PROMPTS]
    engine.step()
    assert all(engine.abort(name) for name in names[1:])  # one runs, two wait
    assert not engine.abort(names[1]) and not engine.abort("nothing")
    ended = {}
    while engine.has_unfinished():
        ended |= {output.request_id: output for output in engine.step() if output.finished}
    assert [ended[name].outputs[0].finish_reason for name in names] == ["length", "abort", "abort", "abort"]
    assert engine.stats().aborted == 3 and engine.stats().free_pages == engine.stats().pages


def test_new_weights_are_seen_and_old_keys_forgotten():
    model = tiny_families.adapt(tiny_families.build("llama"), tiny_families.TARGETS).eval()
    engine = Engine(model, None, EngineOptions(page_size=4))
    greedy, prompt = SamplingParams(temperature=0, max_tokens=10), list(range(5, 30))

    def expected():
        row = torch.tensor([prompt])
        return model.generate(row, attention_mask=torch.ones_like(row), max_new_tokens=10, do_sample=False)[
            0, 25:
        ].tolist()

    seen = []
    for change in ("none", "optimizer", "pointer", "base", "moved"):
        with torch.no_grad():
            adapters = [p for n, p in model.named_parameters() if "lora_" in n]
            if change == "optimizer":
                torch._foreach_mul_(adapters, 1.1)
            elif change == "pointer":  # as optimizers that write without torch's noticing
                for p in adapters:
                    p.detach().numpy()[:] *= 0.7
            elif change == "base":
                model.get_base_model().model.layers[0].mlp.down_proj.base_layer.weight.mul_(1.2)
            elif change == "moved":
                layer = model.get_base_model().model.layers[1].self_attn.v_proj.base_layer
                layer.weight = torch.nn.Parameter(layer.weight * 0.8, requires_grad=False)
        got = engine.generate(prompt, greedy)[0].outputs[0].token_ids
        assert got == expected(), change
        seen.append(tuple(got))
    assert len(set(seen)) == 5


def test_a_head_trained_in_full_is_never_used_for_another_adapter():
    model = tiny_families.build("llama").eval()
    base = Engine(model).generate(PROMPTS, drawn(temperature=0))
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    adapted = get_peft_model(model, config).eval()
    torch.nn.init.normal_(adapted.base_model.model.lm_head.modules_to_save["default"].weight)
    engine = Engine(adapted)
    ours = ids(engine.generate(PROMPTS, drawn(temperature=0)))
    assert ours != ids(base)
    for lora in (False, "default"):
        with pytest.raises(AdapterError, match="trained in full"):
            engine.generate(PROMPTS, drawn(temperature=0), lora=lora)
    assert ids(engine.generate(PROMPTS, drawn(temperature=0))) == ours
    with adapted.disable_adapter():
        assert ids(engine.generate(PROMPTS, drawn(temperature=0))) == ids(base)


def test_an_adapter_put_on_later():
    model = tiny_families.build("llama").eval()
    engine = Engine(model)
    greedy = SamplingParams(temperature=0, max_tokens=8)
    before = engine.generate(PROMPTS, greedy)
    adapted = tiny_families.adapt(model, tiny_families.TARGETS).eval()
    assert ids(engine.generate(PROMPTS, greedy)) != ids(before)
    assert ids(engine.generate(PROMPTS, greedy, lora=False)) == ids(before)
    adapted.merge_adapter()
    merged = ids(engine.generate(PROMPTS, greedy))
    with pytest.raises(AdapterError, match="merged into the weights"):
        engine.generate(PROMPTS, greedy, lora="default")
    adapted.unmerge_adapter()
    assert ids(engine.generate(PROMPTS, greedy)) == merged


def test_sleeping_gives_memory_back_and_changes_nothing(make_engine):
    engine = make_engine()
    expected = ids(engine.generate(PROMPTS, drawn(seed=7)))
    assert engine.stats().cache_bytes > 0
    engine.sleep()
    assert engine.stats().cache_bytes == 0 and engine.stats().pages == 0
    assert ids(engine.generate(PROMPTS, drawn(seed=7))) == expected
    names = [engine.add_request(prompt, drawn(seed=7)) for prompt in PROMPTS]
    engine.step()
    engine.step()
    engine.sleep()  # in the middle: everything is computed again
    ended = {}
    while engine.has_unfinished():
        ended |= {output.request_id: output for output in engine.step() if output.finished}
    assert ids([ended[name] for name in names]) == expected
    standby = make_engine(standby=True)
    standby.generate(PROMPTS, drawn(seed=7))
    assert standby.stats().cache_bytes == 0


def test_eight_bit_cache_is_close(make_engine):
    wide, small = make_engine(), make_engine(float8_kv_cache=True)
    full = wide.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=1))
    rough = small.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=1))
    assert small.stats().cache_bytes * 4 == pytest.approx(wide.stats().cache_bytes, rel=0.3)
    for a, b in zip(full, rough, strict=True):
        assert a.outputs[0].model_logprobs[0] == pytest.approx(b.outputs[0].model_logprobs[0], abs=0.5)
    assert all(len(output.outputs[0].token_ids) == 12 for output in small.generate(PROMPTS, drawn()))


@pytest.mark.parametrize(
    ("prompt", "params", "lora", "error", "match"),
    [
        ([], None, None, ConfigError, "prompt is empty"),
        ([5, 999], None, None, ConfigError, "token ids must be"),
        ([5] * 64, None, None, ConfigError, "64 tokens, and a sequence at most 64"),
        ([[]], None, None, ConfigError, "no prompt"),
        (torch.zeros(3, 5), None, None, ConfigError, "embeddings have the wrong shape"),
        ({"text": "x"}, None, None, ConfigError, "neither prompt nor"),
        ([5], {"logit_bias": {400: 1.0}}, None, ConfigError, "does not have"),
        ([5], None, "nobody", AdapterError, "no adapter of that name"),
        ([5], None, 7, AdapterError, "no adapter"),
    ],
)
def test_bad_requests_are_errors_and_the_engine_goes_on(make_engine, prompt, params, lora, error, match):
    engine = make_engine()
    good = engine.add_request(PROMPTS[0], drawn(seed=1))
    with pytest.raises(error, match=match):
        engine.add_request(prompt, params, lora=lora)
    with pytest.raises(ConfigError, match="id is running"):
        engine.add_request(PROMPTS[0], request_id=good)
    while engine.has_unfinished():
        last = engine.step()
    assert last[0].request_id == good and last[0].outputs[0].finish_reason == "length"


def test_a_step_that_fails_ends_its_requests_only(make_engine, monkeypatch):
    engine = make_engine()
    engine.add_request(PROMPTS[0], drawn())

    def fail(plan):
        raise OverflowError("a number is too large")

    with monkeypatch.context() as broken:
        broken.setattr(engine._runner, "launch", fail)
        (output,) = engine.step()
    assert output.finished and output.error == "a number is too large"
    assert ids(engine.generate(PROMPTS, drawn(seed=3))) == ids(make_engine().generate(PROMPTS, drawn(seed=3)))


def test_a_sequence_may_fill_the_context_but_no_more(make_engine):
    out = make_engine().generate([5] * 60, drawn(max_tokens=None))[0].outputs[0]
    assert len(out.token_ids) == 4 and out.finish_reason == "length"
    small = make_engine(num_pages=5)  # twenty tokens
    assert small.max_model_len == 20
    assert len(small.generate([5] * 6, drawn(max_tokens=50))[0].outputs[0].token_ids) == 14


def test_a_failure_of_the_device_ends_requests_and_not_the_engine(make_engine, monkeypatch):
    engine = make_engine()
    expected = ids(engine.generate(PROMPTS, drawn(seed=1)))

    def fail(plan):
        raise torch.OutOfMemoryError("no memory left")

    with monkeypatch.context() as patched:
        patched.setattr(engine._runner, "launch", fail)
        with pytest.raises(GenerationError, match="no memory left"):
            engine.generate(PROMPTS, drawn(seed=1))
    assert not engine.has_unfinished() and engine.stats().free_pages == engine.stats().pages
    assert ids(engine.generate(PROMPTS, drawn(seed=1))) == expected
    engine.shutdown()
    with pytest.raises(GenerationError, match="was shut down"):
        engine.generate(PROMPTS)
