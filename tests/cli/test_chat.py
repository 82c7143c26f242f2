import io
import sys

import pytest

from unsloth.cli import chat, export, main
from unsloth.core.errors import ConfigError
from unsloth.models import tokenizer as tokenizers


def talk(monkeypatch, *arguments, lines=""):
    monkeypatch.setattr(sys, "argv", ["unsloth", "chat", *arguments])
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    with pytest.raises(SystemExit) as ended:
        main.main()
    return ended.value.code


def test_one_prompt_one_answer(tiny, monkeypatch, capsys):
    again = []
    for _ in range(2):
        assert talk(monkeypatch, str(tiny()), "--prompt", "hello", "--max-tokens", "8", "--temperature", "0") == 0
        again.append(capsys.readouterr().out)
    assert again[0] == again[1] and again[0].endswith("\n")


def test_lines_from_a_pipe_and_commands(tiny, monkeypatch, capsys):
    lines = "/system Be brief\nhello\n/reset\n/nonsense\n\n/system\n/quit\nnever read\n"
    assert talk(monkeypatch, str(tiny()), "--max-tokens", "3", "--precision", "16bit", lines=lines) == 0
    shown = capsys.readouterr().out
    assert "The system message is set." in shown
    assert "The conversation is forgotten." in shown
    assert "Unknown command /nonsense" in shown
    assert "There is no system message now." in shown
    assert "\x1b" not in shown


def test_a_message_that_cannot_be_answered_is_not_the_end(tiny, monkeypatch, capsys):
    lines = "hello\n\udcff\n" + "word " * 3000 + "\nhello\n"
    assert talk(monkeypatch, str(tiny()), "--max-tokens", "3", "--precision", "16bit", lines=lines) == 0
    shown = capsys.readouterr().out
    assert "Error: the text is not Unicode" in shown and "but there is room for" in shown


def test_old_exchanges_make_room_for_new_ones(tiny):
    tokens = tokenizers.load(str(tiny()), max_seq_length=512)
    turns = [{"role": role, "content": f"{role} {i}"} for i in range(4) for role in ("user", "assistant")]
    conversation = chat.Conversation("Be brief", [*turns, {"role": "user", "content": "last"}])
    whole = conversation.tokens(tokens, 10_000)
    shorter = conversation.tokens(tokens, whole.shape[1] - 1)
    text = tokens.decode(shorter[0])
    assert "Be brief" in text and "last" in text and "user 0" not in text and "user 1" in text
    with pytest.raises(ConfigError, match="room for 5"):
        conversation.tokens(tokens, 5)


def test_a_wrong_precision_is_said_before_loading(monkeypatch, capsys):
    assert talk(monkeypatch, "nowhere", "--precision", "3bit") == 2
    assert "Use 4bit, 8bit or 16bit" in capsys.readouterr().err


def test_export_merges_an_adapter_and_keeps_a_model(tiny, tmp_path, capsys):
    import torch
    from transformers import AutoModelForCausalLM

    from unsloth import FastLanguageModel

    model, tokens = FastLanguageModel.from_pretrained(str(tiny()), load_in_16bit=True, max_seq_length=128)
    model = FastLanguageModel.get_peft_model(model, r=4)
    model.save_pretrained(tmp_path / "adapter")
    export.export(export.ExportOptions(str(tmp_path / "adapter"), str(tmp_path / "merged")))
    export.export(export.ExportOptions(str(tiny()), str(tmp_path / "copy")))
    assert "Written to" in capsys.readouterr().out
    assert (tmp_path / "merged/model.safetensors").is_file()
    copied = AutoModelForCausalLM.from_pretrained(tmp_path / "copy").state_dict()
    original = AutoModelForCausalLM.from_pretrained(tiny()).state_dict()
    for name, tensor in original.items():  # rounded once to bfloat16, and not by way of 4 bits
        assert torch.equal(copied[name].float(), tensor.bfloat16().float()), name
