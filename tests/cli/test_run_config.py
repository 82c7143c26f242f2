import pytest

from unsloth.cli import run_config
from unsloth.core.errors import ConfigError

MINIMAL = "model:\n  model_name: x\n"


@pytest.fixture
def read(tmp_path):
    def reader(text, *changes):
        file = tmp_path / "run.yaml"
        file.write_text(text, encoding="utf-8")
        return run_config.read(str(file), changes)

    return reader


def test_numbers_words_and_lists_mean_what_they_look_like(read):
    run = read(
        f"{MINIMAL}training:\n  learning_rate: 1e-4\n  weight_decay: .5\n  max_steps: -1\n  save_strategy: no\n"
        "  bf16: yes\n  run_name: 2024-01-01\nadapter:\n  target_modules: [q_proj, v_proj]\n  lora_alpha: 3.2E+1\n"
    )
    assert dict(run.training) == {
        "learning_rate": 1e-4,
        "weight_decay": 0.5,
        "max_steps": -1,
        "save_strategy": "no",
        "bf16": True,
        "run_name": "2024-01-01",
    }
    assert dict(run.adapter) == {"target_modules": ["q_proj", "v_proj"], "lora_alpha": 32.0}


def test_changes_replace_and_add_values(read):
    run = read(f"{MINIMAL}training:\n  max_steps: 5\n", "training.max_steps=7", "data.path=rows.jsonl", "adapter.r = 4")
    assert run.training["max_steps"] == 7
    assert run.data.path == "rows.jsonl"
    assert run.adapter == {"r": 4}


def test_sections_that_are_left_out_or_empty(read):
    run = read(f"\ufeff{MINIMAL}adapter:\n")
    assert run.adapter is None and run.data is None and run.training == {}
    assert run.save == run_config.SaveOptions()


def test_further_arguments_are_passed_on(read):
    assert read(f"{MINIMAL}  more:\n    low_cpu_mem_usage: true\n").model == {
        "model_name": "x",
        "low_cpu_mem_usage": True,
    }


def test_the_fast_paths_have_switches(read):
    assert read(f"{MINIMAL}  fast_layers: off\n  fused_head: false\n").model == {
        "model_name": "x",
        "fast_layers": False,
        "fused_head": False,
    }
    assert not read(f"{MINIMAL}  fast_layers: no\n").has_fast_layers and read(MINIMAL).has_fast_layers
    with pytest.raises(ConfigError, match="model.fast_layers must be true or false"):
        read(f"{MINIMAL}  fast_layers: 2\n")
    with pytest.raises(ConfigError, match="belongs under 'model:'"):
        read(f"{MINIMAL}adapter:\n  fast_layers: false\n")


def test_the_text_column_has_two_names(read):
    assert read(f"{MINIMAL}data:\n  path: a\ntraining:\n  dataset_text_field: story\n").data.text_field == "story"
    with pytest.raises(ConfigError, match="contradict"):
        read(f"{MINIMAL}data:\n  path: a\n  text_field: tale\ntraining:\n  dataset_text_field: story\n")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("rows: 0", "at least 1"),
        ("eval_rows: 3\n  eval_split: test", "keep either"),
        ("response_part: x", "go together"),
    ],
)
def test_data_options_that_make_no_sense(read, data, said):
    with pytest.raises(ConfigError, match=f"(?i){said}"):
        read(f"{MINIMAL}data:\n  path: a\n  {data}\n")


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GB", 24 * 10**9), ("22.5 GiB", int(22.5 * 2**30)), ("8", 8 * 10**9), ("500m", 500 * 10**6)],
)
def test_sizes_of_memory(text, size):
    assert run_config.parse_memory(text) == size


@pytest.mark.parametrize("text", ["lots", "0GB", "-3GB", "3 apples", ""])
def test_what_is_not_a_size_of_memory(text):
    with pytest.raises(ConfigError, match="Such as 24GB"):
        run_config.parse_memory(text)
