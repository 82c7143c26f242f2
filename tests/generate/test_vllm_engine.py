"""The protocol on vLLM: a small stand-in has the parts of its interface that are used, and computes a formula."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import tiny_families
import torch
from safetensors.torch import load_file

from unsloth.core.errors import AdapterError, ConfigError, GenerationError
from unsloth.generate import model_methods
from unsloth.generate.options import EngineOptions
from unsloth.generate.sampling import SamplingParams
from unsloth.generate.vllm_engine import VllmEngine

PARAMS = SamplingParams(temperature=0, max_tokens=4, logprobs=1)


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str


@dataclass
class Running:
    prompt: list
    params: SimpleNamespace
    lora: LoRARequest | None
    tokens: list = field(default_factory=list)


class LLMEngine:
    """Draws (last token + 1 + a number that the adapter's values make), all completions in turn."""

    made: list = []

    def __init__(self, arguments):
        self.arguments, self.running, self.calls = arguments, {}, []
        LLMEngine.made.append(self)

    @classmethod
    def from_engine_args(cls, arguments):
        return cls(arguments)

    def add_request(self, request_id, prompt, params, lora_request=None):
        assert not self.calls or self.calls[-1] != "sleep"
        self.running[request_id] = Running(prompt["prompt_token_ids"], params, lora_request)

    def has_unfinished_requests(self):
        return bool(self.running)

    def abort_request(self, request_ids):
        for name in request_ids:
            self.running.pop(name)

    def remove_lora(self, number):
        self.calls.append(f"remove {number}")
        return True

    def sleep(self, level):
        self.calls.append("sleep")

    def wake_up(self):
        self.calls.append("wake")

    def step(self):
        return [self.one(name, running) for name, running in list(self.running.items())]

    def one(self, name, running):
        shift = 1 + (0 if running.lora is None else number_of(running.lora.lora_path))
        running.tokens.append(((running.tokens or running.prompt)[-1] + shift) % 200)
        done = len(running.tokens) == running.params.max_tokens
        if done:
            del self.running[name]
        entries = [{t: SimpleNamespace(logprob=-0.5, rank=1, decoded_token=str(t))} for t in running.tokens]
        outputs = [
            SimpleNamespace(
                index=i,
                text=" ".join(map(str, running.tokens)),
                token_ids=list(running.tokens),
                logprobs=entries,
                finish_reason="length" if done else None,
                stop_reason=None,
            )
            for i in range(running.params.n)
        ]
        # while it goes on, one completion at a time
        outputs = outputs if done else outputs[len(running.tokens) % running.params.n :][:1]
        return SimpleNamespace(request_id=name, outputs=outputs, finished=done, num_cached_tokens=0)


def number_of(path):
    tensors = load_file(Path(path) / "adapter_model.safetensors")
    return int(sum(tensor.abs().sum() for tensor in tensors.values())) % 50 + 1


@pytest.fixture
def vllm(monkeypatch):
    """The stand-in as ``vllm``."""
    package, lora, request = ModuleType("vllm"), ModuleType("vllm.lora"), ModuleType("vllm.lora.request")
    package.LLMEngine, package.EngineArgs, package.SamplingParams = LLMEngine, SimpleNamespace, SimpleNamespace
    request.LoRARequest = LoRARequest
    for module in (package, lora, request):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    LLMEngine.made.clear()


@pytest.fixture
def adapted():
    return tiny_families.adapt(tiny_families.build("llama"), tiny_families.TARGETS).eval()


def ids(outputs):
    return [[completion.token_ids for completion in output.outputs] for output in outputs]


def test_without_vllm_it_says_so(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match="vLLM was asked for and cannot be imported"):
        VllmEngine(model)
    with pytest.raises(ConfigError, match="no such backend"):
        EngineOptions(backend="another")


def test_requests_and_results(vllm, model, tokenizer):
    engine = VllmEngine(model, tokenizer, EngineOptions(float8_kv_cache=True, gpu_memory_utilization=0.5))
    arguments = LLMEngine.made[0].arguments
    assert (arguments.max_model_len, arguments.kv_cache_dtype, arguments.gpu_memory_utilization) == (64, "fp8", 0.5)
    first, second = engine.generate([[5, 6], [9]], [PARAMS, SamplingParams(n=3, max_tokens=2)])
    assert ids([first, second]) == [[[7, 8, 9, 10]], [[10, 11]] * 3]
    output = first.outputs[0]
    assert output.finish_reason == "length" and output.model_logprobs == [-0.5] * 4 and output.sampled_logprobs == []
    assert output.cumulative_logprob == -2 and [list(entry) for entry in output.logprobs] == [[7], [8], [9], [10]]
    pieces = list(engine.stream([5, 6], PARAMS))
    assert [piece.outputs[0].new_token_ids for piece in pieces] == [[7], [8], [9], [10]]
    assert "".join(piece.outputs[0].new_text for piece in pieces) == "7 8 9 10"
    name = engine.add_request([5], PARAMS)
    engine.step()
    with pytest.raises(ConfigError, match="cannot sleep while"):
        engine.sleep()
    assert engine.abort(name) and not engine.abort(name) and engine.has_unfinished()
    assert engine.step()[0].outputs[0].finish_reason == "abort" and not engine.has_unfinished()
    stats = engine.stats()
    assert (stats.requests, stats.finished, stats.aborted) == (4, 3, 1)
    engine.sleep()
    assert ids(engine.generate([[5, 6]], PARAMS)) == [[[7, 8, 9, 10]]] and LLMEngine.made[0].calls == ["sleep", "wake"]
    for bad, error in (([], "prompt is empty"), ([5] * 64, "64 tokens"), (torch.zeros(2, 64), "not given embeddings")):
        with pytest.raises(ConfigError, match=error):
            engine.add_request(bad)
    engine.shutdown()
    with pytest.raises(GenerationError, match="shut down"):
        engine.generate([5])


def test_adapters(vllm, adapted, tmp_path):
    engine = VllmEngine(adapted)
    base = ids(engine.generate([[5]], PARAMS, lora=False))
    assert base == [[[6, 7, 8, 9]]]
    live = ids(engine.generate([[5]], PARAMS))
    assert live != base and ids(engine.generate([[5]], PARAMS, lora="default")) == live
    with adapted.disable_adapter():
        assert ids(engine.generate([[5]], PARAMS)) == base
    adapted.save_pretrained(tmp_path / "saved")
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.mul_(1.5)
    changed = ids(engine.generate([[5]], PARAMS))
    assert changed not in (live, base) and LLMEngine.made[0].calls == ["remove 3"]
    loaded = engine.load_adapter("saved", tmp_path / "saved")
    assert engine.adapters() == ["default", "saved"]
    assert ids(engine.generate([[5]], PARAMS, lora=[loaded])) == live
    engine.unload_adapter("saved")
    for bad in ("saved", 7):
        with pytest.raises(AdapterError):
            engine.generate([[5]], PARAMS, lora=bad)
    with pytest.raises(AdapterError, match="no saved adapter"):
        engine.load_adapter("x", tmp_path)
    adapted.merge_adapter()
    with pytest.raises(AdapterError, match="merged into"):
        engine.generate([[5]], PARAMS)


def test_a_base_that_was_trained_is_refused(vllm):
    model = tiny_families.build("llama").train()
    engine = VllmEngine(model)
    assert ids(engine.generate([[5]], PARAMS)) == [[[6, 7, 8, 9]]]
    with torch.no_grad():
        model.lm_head.weight.mul_(1.1)
    with pytest.raises(ConfigError, match="the base model has been trained"):
        engine.generate([[5]], PARAMS)


def test_a_model_generates_through_it(vllm, adapted, tokenizer):
    model_methods.attach(adapted, tokenizer, EngineOptions(backend="vllm"))
    outputs = adapted.fast_generate([[5]], PARAMS, lora_request=False)
    assert ids(outputs) == [[[6, 7, 8, 9]]] and len(LLMEngine.made) == 1
