import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from unsloth import FastLanguageModel
from unsloth.core.errors import ConfigError, DataError, ModelNotFoundError
from unsloth.export import kld, predict
from unsloth.export.gguf import runtime


class Fixed:
    """A predictor with given logits."""

    def __init__(self, logits, nbytes=1):
        self.name, self.nbytes, self.vocabulary, self._logits = "fixed", nbytes, logits[0].shape[-1], logits

    def logits(self, sequences):
        yield from self._logits


def test_the_figures_of_a_case_worked_out_by_hand():
    p = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]]).log()
    q = torch.tensor([[0.25, 0.5, 0.25], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]]).log()
    found = kld.divergence(Fixed([p + 3], 100), Fixed([q - 1], 50), [[0, 1, 2]])
    first = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    assert found.tokens == 3 and found.flips == pytest.approx(1 / 3)
    assert found.mean == pytest.approx(first / 3, abs=1e-6) and found.largest == pytest.approx(first, abs=1e-6)
    assert found.median == pytest.approx(0, abs=1e-6)
    assert found.base_perplexity == pytest.approx(1 / math.sqrt(0.25 * 0.1))
    assert found.perplexity == pytest.approx(1 / math.sqrt(0.5 * 0.1))
    assert (found.base_bytes, found.nbytes) == (100, 50)


def test_the_percentile_is_exceeded_by_one_position_in_a_thousand():
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(2000, 8, generator=generator)
    q = p + 0.1 * torch.randn(2000, 8, generator=generator)
    found = kld.divergence(Fixed([p]), Fixed([q]), [[0] * 2000])
    kl = (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1)
    assert (kl > found.percentile_99_9).sum() == 1 and found.largest > found.percentile_99_9


def test_padded_vocabularies_are_compared_and_others_refused():
    p = torch.randn(3, 10)
    q = torch.cat([p, torch.full((3, 6), 50.0)], dim=1)  # rows that no token has
    assert kld.divergence(Fixed([p]), Fixed([q]), [[0, 1, 2]]).largest < 1e-6
    with pytest.raises(ConfigError, match="different vocabularies"):
        kld.divergence(Fixed([p]), Fixed([torch.randn(3, 2000)]), [[0, 1, 2]])
    with pytest.raises(DataError):
        kld.divergence(Fixed([p]), Fixed([p]), [])


def test_texts_are_what_training_would_see(tokenizer, tmp_path):
    rows = [{"messages": [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c" * 40}]}] * 3
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = kld.sequences_of(tmp_path / "rows.jsonl", tokenizer, context=32, tokens=70)
    assert tokenizer.decode(found[0]).startswith("<|im_start|>user\nab<|im_end|>")
    assert sum(map(len, found)) <= 70 and max(map(len, found)) <= 32 and len(found) >= 2
    (tmp_path / "text.txt").write_text("d" * 100)
    assert tokenizer.decode(kld.sequences_of(tmp_path / "text.txt", tokenizer, context=16)[0]) == "d" * 16


def test_models_and_adapters_are_predicted_with(tiny, tmp_path):
    folder = tiny("llama", tied=False)
    model, _ = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=64, dtype=torch.float32, load_in_16bit=True
    )
    model = FastLanguageModel.get_peft_model(model, r=2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    sequences = [[5, 6, 7, 8], [9, 10], list(range(4, 30))]
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for batch_size in (1, 2):
        base, tokenizer = predict.open_predictor(str(folder), batch_size=batch_size)
        assert len(tokenizer) == 260 and base.nbytes == (folder / "model.safetensors").stat().st_size
        for ids, logits in zip(sequences, base.logits(sequences), strict=True):
            expected = plain(input_ids=torch.tensor([ids])).logits[0]
            assert logits.shape == expected.shape
            assert (logits - expected).norm() / expected.norm() < 0.02
    adapted, _ = predict.open_predictor(str(tmp_path / "adapter"))
    found = kld.divergence(base, adapted, sequences)
    assert found.mean > 0.01 and found.nbytes > found.base_bytes
    assert kld.divergence(base, base, sequences).largest == 0
    four, _ = predict.open_predictor(str(folder), precision="4bit")
    assert 1e-4 < kld.divergence(base, four, sequences).mean < 1


def test_a_gguf_file_is_predicted_with(tiny, tmp_path, monkeypatch):
    if runtime.available() is None:
        pytest.skip("llama.cpp is not installed (extra gguf-run)")
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(tiny()), max_seq_length=64, dtype=torch.float32, load_in_16bit=True
    )
    model.save_pretrained_gguf(tmp_path / "g", tokenizer, quantization_method=["f32", "q4_0"], pre_tokenizer="gpt-2")
    base, _ = predict.open_predictor(str(tiny()))
    sequences = [list(range(4, 30)), [40, 41, 42], [50, 51, 52, 53]]
    (exact,), (rough,) = (list((tmp_path / "g").glob(f"*{kind}*.gguf")) for kind in ("F32", "Q4_0"))
    whole, _ = predict.open_predictor(str(exact))
    monkeypatch.setattr(predict, "_ANSWER_BYTES", 4 * 260 * 10)  # two processes
    assert kld.divergence(base, whole, sequences).mean < 2e-3
    small, none = predict.open_predictor(str(rough))
    found = kld.divergence(whole, small, sequences)
    assert none is None and 1e-4 < found.mean < 5 and found.nbytes == rough.stat().st_size < found.base_bytes
    with pytest.raises(ConfigError, match="only scored"):
        small.generate([1], 2)
    with pytest.raises(ModelNotFoundError):
        predict.open_predictor(str(tmp_path / "none.gguf"))
