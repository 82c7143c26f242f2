import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM

from unsloth.data.masking import IGNORED
from unsloth.train.token_logprobs import TokenLogprobs

SIZE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


def make(kind, folder):
    torch.manual_seed(1)
    if kind == "llama":
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if kind == "gemma2":  # a soft cap that binds
        model = Gemma2ForCausalLM(Gemma2Config(**SIZE, final_logit_softcapping=2.0))
    else:
        model = GraniteForCausalLM(GraniteConfig(**SIZE, logits_scaling=3.0))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def batch(model):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(4, 97, (3, 11), generator=generator)
    attended = torch.ones_like(ids)
    attended[1, 8:] = 0
    labels = ids.masked_fill(attended == 0, IGNORED)
    labels[:, :4] = IGNORED
    labels[2] = IGNORED  # nothing counts in this row
    return {"input_ids": ids, "attention_mask": attended}, labels


def by_hand(model, inputs, labels):
    probabilities = model(**inputs).logits.double().softmax(-1)
    values = torch.zeros(labels.shape[0], labels.shape[1] - 1, dtype=torch.float64)
    for i, t in (labels[:, 1:] != IGNORED).nonzero().tolist():
        values[i, t] = probabilities[i, t, labels[i, t + 1]].log()
    return values


@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "granite"])
def test_values_and_gradients(tiny, kind, chunked):
    model = make(kind, tiny())
    inputs, labels = batch(model)
    expected = by_hand(model, inputs, labels)
    weights = torch.linspace(0.5, 1.5, expected.numel()).view(expected.shape)
    (expected * weights).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    compute = TokenLogprobs(model, chunked)
    found = compute(model, inputs, labels)
    assert compute.chunked is chunked
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    (found * weights).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-4, msg=name)


def test_labels_that_count_are_looked_for_once_a_batch(tiny, monkeypatch):
    model = make("llama", tiny())
    inputs, labels = batch(model)
    compute, searches = TokenLogprobs(model), []
    nonzero = torch.Tensor.nonzero
    monkeypatch.setattr(torch.Tensor, "nonzero", lambda self: searches.append(self) or nonzero(self))
    first = compute(model, inputs, labels)
    assert torch.equal(compute(model, inputs, labels), first)
    assert len(searches) == 1
    others = labels.clone()
    others[0, 5] = IGNORED
    found = compute(model, inputs, others)
    assert len(searches) == 2
    assert found[0, 4] == 0 != first[0, 4]
    found[0, 4] = first[0, 4]
    assert torch.equal(found, first)


def test_no_whole_logits_are_made(tiny):
    model = make("llama", tiny())
    inputs, labels = batch(model)
    shapes = []
    model.lm_head.register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape)))
    TokenLogprobs(model)(model, inputs, labels)
    assert shapes == [(3, 1, model.config.vocab_size)]


def test_a_head_that_does_more_is_noticed(tiny):
    class Doubled(torch.nn.Module):
        def __init__(self, head):
            super().__init__()
            self.head, self.weight = head, head.weight

        def forward(self, hidden):
            return 2 * self.head(hidden)

    model = make("llama", tiny())
    inputs, labels = batch(model)
    model.lm_head = Doubled(copy.deepcopy(model.lm_head))
    compute = TokenLogprobs(model)
    torch.testing.assert_close(
        compute(model, inputs, labels).double(), by_hand(model, inputs, labels), rtol=1e-5, atol=1e-5
    )
    assert not compute.chunked


def test_a_trained_head_is_followed_when_its_adapter_is_off(tiny):
    model = make("llama", tiny("llama", False))
    model = get_peft_model(
        model, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    )
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(1.7)
    inputs, labels = batch(model)
    compute = TokenLogprobs(model)
    with torch.no_grad():
        on = compute(model, inputs, labels).double()
        torch.testing.assert_close(on, by_hand(model, inputs, labels), rtol=1e-5, atol=1e-5)
        with model.disable_adapter():
            off = compute(model, inputs, labels).double()
            torch.testing.assert_close(off, by_hand(model, inputs, labels), rtol=1e-5, atol=1e-5)
    assert compute.chunked and (on - off).abs().max() > 0.01


def test_an_adapter_on_the_head_takes_whole_logits(tiny):
    model = get_peft_model(
        make("llama", tiny("llama", False)), LoraConfig(target_modules=["lm_head"], task_type="CAUSAL_LM")
    )
    assert not TokenLogprobs(model).chunked


@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_temperature_and_entropy(tiny, kind, chunked):
    model = make(kind, tiny())
    inputs, labels = batch(model)
    counts = labels[:, 1:] != IGNORED
    found = TokenLogprobs(model, chunked).scores(model, inputs, labels, temperature=0.7, entropy_grad=True)
    weights = torch.linspace(-1, 1, counts.numel()).view(counts.shape)
    (found.logprobs * weights + 0.3 * found.entropy * weights.flip(0)).sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    every = (model(**inputs).logits[:, :-1] / 0.7).log_softmax(-1)
    chosen = every.gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0] * counts
    entropy = -(every.exp() * every).sum(-1) * counts
    torch.testing.assert_close(found.logprobs, chosen, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.entropy, entropy, rtol=1e-5, atol=1e-5)
    (chosen * weights + 0.3 * entropy * weights.flip(0)).sum().backward()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, model.get_parameter(name).grad, rtol=1e-3, atol=1e-4, msg=name)
    constant = TokenLogprobs(model, chunked).scores(model, inputs, labels, temperature=0.7, entropy=True)
    assert not constant.entropy.requires_grad and constant.logprobs.requires_grad
    assert TokenLogprobs(model, chunked).scores(model, inputs, labels).entropy is None
