"""What a tokenizer lacks is said, or given, when it is loaded."""

import json
import logging
import shutil

import pytest

from unsloth import FastLanguageModel
from unsloth.core.errors import TokenizerError


@pytest.fixture
def edited(tiny, tmp_path):
    """``edited(**changes)``: the tiny model with another tokenizer_config.json (None removes a key)."""

    def make(**changes):
        folder = shutil.copytree(tiny(), tmp_path / "model")
        path = folder / "tokenizer_config.json"
        config = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
        return folder

    return make


@pytest.fixture
def warnings_of(monkeypatch):
    """The messages of the library's own logger, which does not propagate."""
    messages = []

    class Keep(logging.Handler):
        def emit(self, record):
            messages.append(record.getMessage())

    handler = Keep()
    logging.getLogger("unsloth").addHandler(handler)
    yield messages
    logging.getLogger("unsloth").removeHandler(handler)


def load(folder, **options):
    return FastLanguageModel.from_pretrained(str(folder), max_seq_length=64, load_in_16bit=True, **options)


def test_padding_differs_from_the_end_of_a_text(edited):
    model, tokenizer = load(edited(pad_token="<|im_end|>"))
    assert tokenizer.pad_token == "<pad>" != tokenizer.eos_token
    assert model.config.pad_token_id == model.generation_config.pad_token_id == tokenizer.pad_token_id


def test_a_missing_padding_token_is_chosen_and_left_if_asked(edited, tmp_path):
    folder = edited(pad_token=None)
    assert load(folder)[1].pad_token == "<pad>"
    assert load(folder, fix_tokenizer=False)[1].pad_token is None


def test_a_missing_or_another_end_is_said(edited, warnings_of, tmp_path):
    _, tokenizer = load(edited(eos_token=None))
    assert tokenizer.eos_token is None
    assert any("no eos_token" in message and "'<|im_end|>'" in message for message in warnings_of)
    warnings_of.clear()
    shutil.rmtree(tmp_path / "model")
    load(edited(eos_token="<|endoftext|>"))
    assert any("'<|endoftext|>'" in message and "'<|im_end|>'" in message for message in warnings_of)


def test_no_tokenizer_and_a_broken_one(tiny, tmp_path):
    folder = shutil.copytree(tiny(), tmp_path / "model")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match="cannot be read"):
        load(folder)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(TokenizerError, match="has no tokenizer"):
        load(folder)
