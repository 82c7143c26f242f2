import importlib.util
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from unsloth.core.errors import ConfigError, UnslothError
from unsloth.export import harness, predict

INSTALLED = importlib.util.find_spec("lm_eval") is not None
needs_harness = pytest.mark.skipif(not INSTALLED, reason="the lm-evaluation-harness is not installed (extra eval)")

CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
WRITE = """
task: tiny_write
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{written}}}}"
generation_kwargs: {{max_gen_toks: 4, until: ["never"]}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


@pytest.mark.skipif(INSTALLED, reason="the lm-evaluation-harness is installed")
def test_without_the_harness_the_error_says_how_to_get_it(tiny):
    with pytest.raises(UnslothError, match=r"unsloth\[eval\]"):
        harness.evaluate(None, None, ["hellaswag"])


@needs_harness
def test_tasks_are_scored_as_by_hand(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    predictor, tokenizer = predict.open_predictor(str(tiny()))
    model = AutoModelForCausalLM.from_pretrained(tiny(), dtype=torch.float32)
    rows = []
    for number in range(6):
        text, choices = f"Say {number}:", [" yes", " no", " maybe not"]
        prompt = tokenizer(text).input_ids
        scores = []
        for choice in choices:
            ids = tokenizer(text + choice).input_ids
            log = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            scores.append(sum(log[i - 1, ids[i]].item() for i in range(len(prompt), len(ids))))
        best = max(range(3), key=scores.__getitem__)
        made = model.generate(torch.tensor([prompt]), max_new_tokens=4, do_sample=False)[0, len(prompt) :]
        written = tokenizer.decode(made, skip_special_tokens=True)
        answer = best if number % 3 else (best + 1) % 3  # two of six are wrong
        rows.append({"question": text, "choices": choices, "answer": answer, "written": written})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in (("choice", CHOICE), ("write", WRITE)):
        (tmp_path / f"{name}.yaml").write_text(text.format(data=tmp_path / "rows.jsonl"))
    found = harness.evaluate(predictor, tokenizer, ["tiny_choice", "tiny_write"], include_path=tmp_path)
    assert found["tiny_choice"]["acc,none"] == pytest.approx(4 / 6)
    assert found["tiny_write"]["exact_match,none"] == 1
    with pytest.raises(ConfigError, match="no such task"):
        harness.evaluate(predictor, tokenizer, [], include_path=tmp_path)
