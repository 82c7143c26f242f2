"""Text to calibrate on: where it comes from, and how it is cut."""

import json

import pytest
import torch

from unsloth import FastLanguageModel, SFTConfig, SFTTrainer
from unsloth.core.errors import ConfigError, DataError
from unsloth.data import calibration as shipped
from unsloth.export import calibration


def test_conversations_are_rendered_with_the_chat_template(tokenizer, conversations):
    text = calibration.read(conversations, tokenizer, tokens=10**6, length=64)
    expected = "".join(tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in conversations)
    assert tokenizer.decode(torch.cat(text.chunks)) == expected
    assert {len(chunk) for chunk in text.chunks[:-1]} == {64}


def test_a_file_and_rows_of_tokens_are_the_same_text(tokenizer, conversations, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, conversations)))
    by_file = calibration.read(str(path), tokenizer, tokens=500)
    encoded = [
        {"input_ids": tokenizer(tokenizer.apply_chat_template(row["messages"], tokenize=False)).input_ids}
        for row in conversations
    ]
    by_tokens = calibration.read(encoded, tokenizer, tokens=500)
    assert by_file.source == "rows.jsonl"
    assert by_file.tokens == 500
    assert torch.equal(torch.cat(by_file.chunks), torch.cat(by_tokens.chunks))


def test_of_a_large_data_set_the_whole_is_seen(tokenizer):
    rows = [{"text": f"{number:06}"} for number in range(20_000)]
    text = tokenizer.decode(torch.cat(calibration.read(rows, tokenizer, tokens=10**6).chunks))
    numbers = [int(part) for part in text.split("<|im_end|>") if part]
    assert len(numbers) == 4096
    assert numbers[0] == 0 and numbers[-1] > 19_900


@pytest.mark.parametrize("template", [True, False])
def test_what_ships_is_text_for_models_with_and_without_a_chat_template(template, tokenizer):
    before = tokenizer.chat_template
    try:
        tokenizer.chat_template = before if template else None
        text = calibration.read(None, tokenizer, tokens=10**6)
    finally:
        tokenizer.chat_template = before
    decoded = tokenizer.decode(torch.cat(text.chunks))
    assert ("<|im_start|>assistant" in decoded) is template
    assert all(row["messages"][-1]["content"] in decoded for row in shipped.rows())


def test_every_conversation_that_ships_is_whole():
    for row in shipped.rows():
        roles = [message["role"] for message in row["messages"] if message["role"] != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2)


@pytest.mark.parametrize(
    ("rows", "options", "error"),
    [([], {}, DataError), ([{"a": 1}], {}, DataError), ([{"text": "x"}], {"tokens": 0}, ConfigError)],
)
def test_what_cannot_be_calibrated_on(rows, options, error, tokenizer):
    with pytest.raises(error):
        calibration.read(rows, tokenizer, **options)


def test_after_a_run_its_rows_are_taken(tiny, conversations, tmp_path):
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(tiny()), max_seq_length=128, dtype=torch.float32, load_in_16bit=True
    )
    model = FastLanguageModel.get_peft_model(model, r=2)
    assert calibration.of_model(model, None, tokenizer).source == calibration.SHIPPED
    trainer = SFTTrainer(
        model=model,
        tokenizer=tokenizer,
        train_dataset=conversations,
        args=SFTConfig(output_dir=str(tmp_path), max_steps=1, report_to="none", use_cpu=True, save_strategy="no"),
    )
    trainer.train()
    found = calibration.of_model(model, None, tokenizer, tokens=10**6)
    assert found.source == calibration.TRAINED
    assert found.tokens == sum(len(row["input_ids"]) for row in trainer.train_dataset)
    assert calibration.of_model(model, [{"text": "other"}], tokenizer).source == "list"
