"""M04: an adapter_config.json that cannot be right is refused before the base model is loaded."""

import json
import math

import pytest

from unsloth import FastLanguageModel
from unsloth.core.errors import UnslothError
from unsloth.models import load as loading

WRONG = {
    "r is 0": ({"r": 0}, "r in .*positive whole number"),
    "r is text": ({"r": "16"}, "r in .*positive whole number"),
    "alpha is NaN": ({"lora_alpha": math.nan}, "lora_alpha in .*positive number"),
    "alpha is infinite": ({"lora_alpha": math.inf}, "lora_alpha"),
    "dropout is 1": ({"lora_dropout": 1.0}, "lora_dropout"),
    "a rank in the pattern is 0": ({"rank_pattern": {"q_proj": 0}}, "rank_pattern"),
    "unknown key": ({"use_dora_2": True}, "use_dora_2.*Upgrade peft"),
    "unknown kind": ({"peft_type": "LORA9"}, "peft_type"),
    "imports a module": ({"megatron_config": {"a": 1}, "megatron_core": "os"}, "module to be imported"),
    "no base": ({"base_model_name_or_path": None}, "which model it was trained on"),
    "absolute base that is not here": ({"base_model_name_or_path": "/nowhere/model"}, "folder that is not here"),
    "relative base": ({"base_model_name_or_path": "../../etc"}, "folder that is not here"),
    "base climbs out": ({"base_model_name_or_path": "a/../../b"}, "folder that is not here"),
}


@pytest.fixture
def adapter(tiny, tmp_path):
    model, _ = FastLanguageModel.from_pretrained(str(tiny()), max_seq_length=64, load_in_16bit=True)
    FastLanguageModel.get_peft_model(model, r=2).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def change(adapter, changes):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("case", WRONG)
def test_it_is_refused_before_the_base_is_loaded(adapter, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    changes, message = WRONG[case]
    change(adapter, changes)
    monkeypatch.setattr(loading, "_load_base", lambda *args: pytest.fail("the base model was loaded"))
    with pytest.raises(UnslothError, match=message) as caught:
        FastLanguageModel.from_pretrained(str(adapter), max_seq_length=64)
    assert len(str(caught.value).splitlines()) <= 5


def test_new_settings_that_are_switched_off_do_no_harm(adapter):
    change(adapter, {"use_dora_2": False, "a_later_setting": None})
    assert FastLanguageModel.from_pretrained(str(adapter), max_seq_length=64, load_in_16bit=True)


def test_an_adapter_on_an_adapter(adapter, tmp_path):
    change(adapter, {"base_model_name_or_path": str(adapter)})
    with pytest.raises(UnslothError, match="adapter itself"):
        FastLanguageModel.from_pretrained(str(adapter), max_seq_length=64)


@pytest.mark.parametrize("content", ["", "[1]", "{"])
def test_broken_json(adapter, content):
    (adapter / "adapter_config.json").write_text(content)
    with pytest.raises(UnslothError, match=r"adapter_config\.json"):
        FastLanguageModel.from_pretrained(str(adapter), max_seq_length=64)
