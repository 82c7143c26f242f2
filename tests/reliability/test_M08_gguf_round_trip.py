"""M08: a model that becomes GGUF and is loaded again is the same: tensors, tokenizer, template, ends, predictions."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from unsloth import FastLanguageModel
from unsloth.export import verify
from unsloth.export.gguf import check, runtime
from unsloth.models import gguf_header

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Wie heißt der Fluß? 12.5%"},
    {"role": "assistant", "content": "Rhine."},
    {"role": "user", "content": "And the lake?"},
]


def small_tokenizer():
    """Byte-level BPE of 600 tokens that cuts words as SmolLM2 does."""
    tokenizer = Tokenizer(models.BPE())
    digits, words = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*check.TEXTS] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML,
    )


@pytest.fixture(
    scope="module", params=["small", pytest.param("SmolLM2's", marks=[pytest.mark.soak, pytest.mark.model])]
)
def folder(request, tmp_path_factory):
    """A small random llama with a tokenizer trained here, or with SmolLM2's."""
    folder = tmp_path_factory.mktemp("model") / "small"
    if request.param == "small":
        tokenizer = small_tokenizer()
    else:
        tokenizer = AutoTokenizer.from_pretrained(request.getfixturevalue("smollm2"))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("method", ["bf16", "q8_0", "q4_k_m"])
def test_the_round_trip(method, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("UNSLOTH_CACHE", str(tmp_path / "cache"))
    options = {"max_seq_length": 128, "load_in_16bit": True, "dtype": torch.bfloat16}
    model, tokenizer = FastLanguageModel.from_pretrained(str(folder), **options)
    model.save_pretrained_gguf(tmp_path / "out", tokenizer, method)
    (path,) = (tmp_path / "out").glob("*.gguf")
    again, other = FastLanguageModel.from_pretrained(str(tmp_path / "out"), gguf_file=path.name, **options)

    before = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    assert {name: tuple(tensor.shape) for name, tensor in again.named_parameters()} == before
    assert len(gguf_header.read(path).tensors) == len(before)
    assert len(other) == len(tokenizer)
    for text in check.TEXTS:
        assert other(text).input_ids == tokenizer(text).input_ids, text
    assert other.chat_template == tokenizer.chat_template
    rendered = [t.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True) for t in (tokenizer, other)]
    assert rendered[0] == rendered[1]
    assert (other.eos_token, other.bos_token) == (tokenizer.eos_token, tokenizer.bos_token)

    ids = torch.tensor([tokenizer(check.TEXTS[0]).input_ids])
    with torch.no_grad():
        logits = [m(input_ids=ids).logits[0].float() for m in (model, again)]
    limit = {"bf16": 1e-6, "q8_0": 1e-2, "q4_k_m": 0.3}[method]
    assert verify.compare(*logits).median_kl < limit
    if runtime.available():
        found = runtime.ask(runtime.Request(path, ids=ids.tolist()))
        assert verify.compare(logits[1], found.logits[0]).median_kl < 1e-2
        assert found.eos == tokenizer.eos_token_id
