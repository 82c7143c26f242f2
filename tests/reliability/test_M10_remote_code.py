"""M10: no code of a repository runs without the argument trust_remote_code=True, whatever the repository says."""

import json
import shutil

import pytest

from unsloth import FastLanguageModel
from unsloth.core.errors import ConfigError

CONFIGURATION = """
import os
os.makedirs({canary!r}, exist_ok=True)
from transformers import LlamaConfig

class OwnConfig(LlamaConfig):
    model_type = "own"
"""
MODEL = """
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def repository(tiny, tmp_path, monkeypatch):
    """``repository(config, tokenizer_config)``: the tiny model with code, and these changes."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")

    def make(config=None, tokenizer_config=None):
        folder = shutil.copytree(tiny(), tmp_path / "repository")
        (folder / "configuration_own.py").write_text(CONFIGURATION.format(canary=str(tmp_path / "canary")))
        (folder / "modeling_own.py").write_text(MODEL)
        for name, changes in (("config.json", config), ("tokenizer_config.json", tokenizer_config)):
            content = json.loads((folder / name).read_text())
            (folder / name).write_text(json.dumps(content | (changes or {})))
        return folder

    return make


AUTO_MAP = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}


def load(folder, **options):
    return FastLanguageModel.from_pretrained(str(folder), max_seq_length=64, load_in_16bit=True, **options)


def test_a_model_of_its_own_kind_is_refused(repository, tmp_path):
    folder = repository({"model_type": "own", "auto_map": AUTO_MAP})
    with pytest.raises(ConfigError, match=r"configuration_own\.py.*modeling_own\.py.*trust_remote_code=True"):
        load(folder)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    "config",
    [
        {"auto_map": AUTO_MAP},
        {"trust_remote_code": True, "auto_map": AUTO_MAP},
        {"model_file": "configuration_own.py"},
        {"_attn_implementation_internal": "someone/kernel"},
        {"_attn_implementation": "someone/kernel"},
        {"attn_implementation": "someone/kernel"},
    ],
)
def test_a_known_kind_loads_without_the_code(repository, tmp_path, config):
    model, _ = load(repository(config))
    assert type(model).__module__.startswith("transformers.")
    assert model.config._attn_implementation in ("sdpa", "eager")
    assert not (tmp_path / "canary").exists()


def test_a_tokenizer_of_its_own_kind(repository, tmp_path):
    own = {"AutoTokenizer": ["configuration_own.OwnTokenizer", "configuration_own.OwnTokenizer"]}
    folder = repository(tokenizer_config={"auto_map": own, "tokenizer_class": "OwnTokenizer"})
    try:
        load(folder)
    except ConfigError as error:
        assert "trust_remote_code=True" in str(error)
    assert not (tmp_path / "canary").exists()


def test_a_kernel_as_argument_needs_trust(tiny):
    with pytest.raises(ConfigError, match="names a repository"):
        load(tiny(), attn_implementation="someone/kernel")


def test_the_argument_runs_the_code(repository, tmp_path):
    """The canary works: otherwise the tests above would prove nothing."""
    load(repository({"model_type": "own", "auto_map": AUTO_MAP}), trust_remote_code=True)
    assert (tmp_path / "canary").is_dir()
