"""M07: a GGUF export that is killed leaves nothing that loads as a finished model; the next one succeeds."""

import os
import signal

import pytest
import torch

from unsloth import FastLanguageModel
from unsloth.core import artifact
from unsloth.core.errors import UnslothError
from unsloth.export.gguf import file

METHODS = ["q8_0", "f16"]


@pytest.fixture(scope="module")
def model(tiny):
    loaded, tokenizer = FastLanguageModel.from_pretrained(
        str(tiny()), max_seq_length=64, dtype=torch.float32, load_in_4bit=True
    )
    model = FastLanguageModel.get_peft_model(loaded, r=4)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model, tokenizer


def kill_in_a_child(save, when):
    """Fork, and let the child be killed (SIGKILL) as it writes the given tensor, or as all files are there."""
    child = os.fork()
    if child:
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        return
    put, count = file.Writer.put, iter(range(10**9))

    def cut(*args):
        if next(count) == when:
            os.kill(os.getpid(), signal.SIGKILL)
        put(*args)

    file.Writer.put = cut
    artifact.write_manifest = lambda *args, **options: os.kill(os.getpid(), signal.SIGKILL)
    try:
        save()
    finally:
        os._exit(1)


# The conversion has 20 tensors: killed in its first and its middle, in the first file and the second, at the end.
@pytest.mark.parametrize("when", [0, 11, 20, 33, 45, 10**6])
def test_a_killed_export_leaves_nothing_under_its_name(model, tmp_path, when):
    model, tokenizer = model
    target = tmp_path / "out"
    save = lambda: model.save_pretrained_gguf(target, tokenizer, METHODS, verify=False)
    kill_in_a_child(save, when)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out.stage-")
    with pytest.raises(UnslothError):
        FastLanguageModel.from_pretrained(str(target), gguf_file="model.gguf")
    save()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert artifact.verify(target) == [] and len(list(target.glob("*.gguf"))) == 2


def test_a_killed_export_leaves_the_earlier_files(model, tmp_path):
    model, tokenizer = model
    target = tmp_path / "out"
    model.save_pretrained_gguf(target, tokenizer, "q8_0", verify=False)
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    kill_in_a_child(lambda: model.save_pretrained_gguf(target, tokenizer, METHODS, verify=False), 30)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
