"""M07: a GGUF export that is killed leaves nothing that loads as a finished model; the next one succeeds."""

import pytest
from tests.reliability import killed_child

from unsloth import FastLanguageModel
from unsloth.core import artifact
from unsloth.core.errors import UnslothError
from unsloth.export.gguf import file

METHODS = ["q8_0", "f16"]


@pytest.fixture(scope="module")
def model(tiny):
    return killed_child.adapted(tiny())


def kill_in_a_child(save, when):
    """Kill a child that saves as it writes the given tensor, or as all files are there."""
    put, count = file.Writer.put, iter(range(10**9))

    def cut(*args):
        if next(count) == when:
            killed_child.die()
        put(*args)

    killed_child.kill_in_a_child(save, lambda: setattr(file.Writer, "put", cut))


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
