import sys

import pytest
from packaging.requirements import Requirement

from unsloth.cli import doctor, main, models


def test_this_machine_is_fit_for_training(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["unsloth", "doctor"])
    with pytest.raises(SystemExit) as ended:
        main.main()
    shown = capsys.readouterr().out
    assert ended.value.code == 0, shown
    assert "Training works here" in shown
    for subject in ("python", "attention", "Triton kernels", "4-bit weights", "hub cache", "model hub"):
        assert subject in shown


def test_a_broken_check_is_a_finding_and_ends_with_1(monkeypatch, capsys):
    def _the_weather():
        yield doctor.Finding("sun", "ok", "shines")
        raise RuntimeError("it\nrains")

    monkeypatch.setattr(doctor, "CHECKS", (_the_weather,))
    monkeypatch.setattr(sys, "argv", ["unsloth", "doctor"])
    with pytest.raises(SystemExit) as ended:
        main.main()
    shown = capsys.readouterr().out
    assert ended.value.code == 1
    assert "sun" in shown and "the weather" in shown and "RuntimeError: it rains" in shown
    assert "Training will not work here: see the weather." in shown


def test_versions_out_of_range_and_missing_packages_name_the_command():
    assert doctor._version(Requirement("pytest>=1")).status == "ok"
    old = doctor._version(Requirement("pytest<1"))
    assert old.status == "broken" and "pip install 'pytest<1'" in old.detail
    assert "not installed" in doctor._version(Requirement("no-such-package-here")).detail


def test_an_unreachable_hub_is_not_a_fault(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    (finding,) = doctor._hub()
    assert finding.status == "note" and "not reachable" in finding.detail


def test_the_cache_lists_what_can_be_loaded(tmp_path, monkeypatch, capsys):
    def put(repository, **files):
        folder = tmp_path / repository / "snapshots" / "abc"
        folder.mkdir(parents=True)
        for name, content in files.items():
            (folder / name.replace("__", ".")).write_text(content)

    put("models--org--whole--part", config__json='{"model_type": "llama"}', model__safetensors="x" * 1000)
    put("models--org--adapter", adapter_config__json="{}", adapter_model__safetensors="x")
    put("models--org--tokenizer-only", config__json='{"model_type": "llama"}')
    put("models--org--damaged", config__json="{", model__safetensors="x")
    put("datasets--org--rows", data__json="{}")
    found = {name: kind for name, kind, _ in models.cached_models(tmp_path)}
    assert found == {"org/whole--part": "llama", "org/adapter": "adapter"}
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    models.models()
    shown = capsys.readouterr().out
    assert "org/adapter" in shown and "embedded:SmolLM2-135M-Instruct" in shown
