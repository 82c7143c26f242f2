import dataclasses
import inspect

import pytest

from unsloth import FastLanguageModel
from unsloth.cli import run_config, schema
from unsloth.cli.methods import METHODS
from unsloth.core.errors import ConfigError
from unsloth.models.adapters import AdapterOptions
from unsloth.models.load import LoadOptions


def fields(cls):
    return {field.name for field in dataclasses.fields(cls) if field.init and not field.name.startswith("_")}


def test_the_sections_have_the_fields_of_the_classes_they_are_read_from():
    sections = run_config.sections()
    switches = {"load_in_4bit", "load_in_8bit", "load_in_16bit", "full_finetuning"}
    switches |= {"fast_layers", "fused_head"}
    assert set(sections["model"]) == fields(LoadOptions) - {"precision", "trust_remote_code"} | switches
    arguments = set(inspect.signature(FastLanguageModel.from_pretrained).parameters)
    without = {"trust_remote_code", "use_exact_model_name", "offload_embeddings", "kwargs"}  # or under another name
    without |= {"fast_inference", "gpu_memory_utilization", "float8_kv_cache"}  # for generating
    assert set(sections["model"]) == arguments - without | {"more"}
    assert set(sections["adapter"]) == fields(AdapterOptions)
    assert METHODS.keys() == schema.TRAINING.keys()
    for name, method in METHODS.items():
        assert set(run_config.training_keys(name)) == fields(method.config) | {"method"}, name
    assert set(sections["data"]) == fields(run_config.DataOptions)
    assert set(sections["save"]) == fields(run_config.SaveOptions)


def test_a_later_class_overrides_the_type_of_an_earlier_one():
    keys = run_config.sections()["training"]
    assert keys["gradient_checkpointing"].kinds == {"bool", "none"}  # bool alone in transformers
    assert keys["lr_scheduler_type"].kinds == {"str"}  # an enumeration, or its name
    assert keys["report_to"].kinds == {"none", "str", "list"}


@pytest.mark.parametrize(
    ("kinds", "value", "expected"),
    [
        ({"float"}, 3, 3),
        ({"bool"}, "yes", True),
        ({"bool", "none"}, "off", False),
        ({"str", "bool"}, "no", "no"),
        ({"str", "none"}, None, None),
        ({"list", "str"}, ["a"], ["a"]),
        ({"any"}, {"a": 1}, {"a": 1}),
    ],
)
def test_values_of_the_right_type_pass(kinds, value, expected):
    converted = schema.convert(value, schema.Key(frozenset(kinds)), "here")
    assert converted == expected and type(converted) is type(expected)


@pytest.mark.parametrize(
    ("kinds", "value", "said"),
    [
        ({"int"}, 1.5, "a whole number"),
        ({"int"}, True, "a whole number"),
        ({"int", "float"}, "x", "must be a number:"),
        ({"str"}, 5, "in quotes"),
        ({"list"}, "a", "a list"),
        ({"bool", "none"}, "maybe", "true or false:"),
    ],
)
def test_values_of_another_type_are_refused(kinds, value, said):
    with pytest.raises(ConfigError, match=said):
        schema.convert(value, schema.Key(frozenset(kinds)), "here")


def test_a_literal_lists_its_values():
    key = run_config.sections()["data"]["format"]
    assert schema.convert(None, key, "here") is None
    with pytest.raises(ConfigError, match="one of json, jsonl, csv, tsv, xlsx, parquet, txt"):
        schema.convert("xml", key, "here")


def test_a_class_that_has_moved_is_an_error():
    with pytest.raises(ConfigError, match="does not define Nothing"):
        schema.keys_of(schema.ClassSource("trl", "trainer/sft_config.py", "Nothing"))
    with pytest.raises(ConfigError, match="not installed"):
        schema.keys_of(schema.ClassSource("no_such_package_here", "a.py", "A"))
