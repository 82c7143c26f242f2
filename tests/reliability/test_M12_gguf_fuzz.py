"""M12: a GGUF file from anywhere, every number of whose header may lie.

It is read in a child process with limits; whatever stands in it, there is a clear error within seconds, or a true
header. The counts and sizes of the catalogue are set on purpose, every field is overwritten with extreme numbers, and
the file is cut at every byte of its header.
"""

import random
import struct
import time

import numpy as np
import pytest
from gguf import GGUFWriter

from unsloth import FastLanguageModel
from unsloth.core.errors import CheckpointError, UnslothError
from unsloth.models import gguf, gguf_header

EXTREME = [0, 1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1]


@pytest.fixture(scope="module")
def true_file(tmp_path_factory):
    """A small file with every kind of value, and its bytes."""
    path = tmp_path_factory.mktemp("gguf") / "true.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_uint32("a.number", 7)
    writer.add_float32("a.real", 0.5)
    writer.add_bool("a.switch", True)
    writer.add_array("a.words", ["one", "two", "three"])
    writer.add_array("a.numbers", [1, 2, 3])
    writer.add_tensor("x.weight", np.ones((4, 32), dtype=np.float32))
    writer.add_tensor("y.weight", np.ones(5, dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, path.read_bytes()


def read_or_refuse(path):
    """The header, or None if it is refused; anything but the reader's own error is a failure."""
    try:
        return gguf_header.read(path)
    except gguf_header.GgufFormatError as error:
        assert str(error)
        return None


def header(version=3, tensors=0, entries=0, rest=b""):
    return b"GGUF" + struct.pack("<IQQ", version, tensors, entries) + rest


def text(value):
    return struct.pack("<Q", len(value)) + value


def entry(key, kind, value):
    return text(key) + struct.pack("<I", kind) + value


def tensor(name=b"x", dimensions=1, shape=(4,), kind=0, offset=0):
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", dimensions, *shape, kind, offset)


LIES = {
    "2^63 entries": header(entries=2**63),
    "2^63 tensors": header(tensors=2**63),
    "a key of 2^63 bytes": header(entries=1, rest=struct.pack("<Q", 2**63)),
    "a value of 2^63 bytes": header(entries=1, rest=entry(b"a", 8, struct.pack("<Q", 2**63))),
    "an array of 2^62 strings": header(entries=1, rest=entry(b"a", 9, struct.pack("<IQ", 8, 2**62))),
    "an array of 2^62 numbers": header(entries=1, rest=entry(b"a", 9, struct.pack("<IQ", 0, 2**62))),
    "an array of arrays": header(entries=1, rest=entry(b"a", 9, struct.pack("<IQ", 9, 1) + bytes(64))),
    "an unknown type of value": header(entries=1, rest=entry(b"a", 77, bytes(64))),
    "an alignment of 2^31": header(entries=1, rest=entry(b"general.alignment", 4, struct.pack("<I", 2**31))),
    "an alignment of zero": header(entries=1, rest=entry(b"general.alignment", 4, struct.pack("<I", 0))),
    "an alignment in words": header(entries=1, rest=entry(b"general.alignment", 8, text(b"32"))),
    "2^32 - 1 dimensions": header(tensors=1, rest=tensor(dimensions=2**32 - 1) + bytes(64)),
    "no dimension": header(tensors=1, rest=tensor(dimensions=0, shape=()) + bytes(64)),
    "an empty dimension": header(tensors=1, rest=tensor(shape=(0,)) + bytes(64)),
    "a product beyond 64 bits": header(tensors=1, rest=tensor(dimensions=2, shape=(2**40, 2**40)) + bytes(64)),
    "an unknown type of tensor": header(tensors=1, rest=tensor(kind=999) + bytes(64)),
    "rows that are no blocks": header(tensors=1, rest=tensor(shape=(33,), kind=2) + bytes(64)),
    "data beyond the end": header(tensors=1, rest=tensor(offset=2**60) + bytes(64)),
    "data that is not aligned": header(tensors=1, rest=tensor(offset=3) + bytes(64)),
    "two tensors in one place": header(tensors=2, rest=tensor(b"x") + tensor(b"y") + bytes(128)),
    "two tensors of one name": header(tensors=2, rest=tensor(b"x") + tensor(b"x", offset=32) + bytes(128)),
    "two entries of one name": header(entries=2, rest=entry(b"a", 0, b"1") * 2),
    "a name that is no text": header(tensors=1, rest=tensor(b"\xff\xfe") + bytes(64)),
    "the other order of bytes": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "version 1": header(version=1),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_refused(lie, tmp_path):
    path = tmp_path / "lie.gguf"
    path.write_bytes(LIES[lie])
    with pytest.raises(gguf_header.GgufFormatError):
        gguf_header.read(path)


def test_a_true_file_is_read(true_file):
    found = gguf_header.read(true_file[0])
    assert found.metadata["a.words"] == ["one", "two", "three"] and found.metadata["a.switch"] is True
    assert [(t.name, t.shape, t.size) for t in found.tensors] == [("x.weight", (4, 32), 512), ("y.weight", (5,), 10)]
    assert np.frombuffer(true_file[1], "<f4", 128, found.tensors[0].offset).sum() == 128


def test_a_file_cut_at_any_byte_is_refused(true_file, tmp_path):
    path, content = true_file
    end = max(tensor.offset + tensor.size for tensor in gguf_header.read(path).tensors)
    for length in range(end):
        (tmp_path / "cut.gguf").write_bytes(content[:length])
        assert read_or_refuse(tmp_path / "cut.gguf") is None, length


def test_every_number_may_be_extreme(true_file, tmp_path, soak):
    path, content = true_file
    begin = gguf_header.read(path).data_offset
    places = range(4, begin - 8, 1 if soak else 3)
    for place in places:
        for number in EXTREME:
            changed = content[:place] + struct.pack("<Q", number) + content[place + 8 :]
            (tmp_path / "odd.gguf").write_bytes(changed)
            read_or_refuse(tmp_path / "odd.gguf")


def test_random_damage(true_file, tmp_path, soak):
    path, content = true_file
    begin = gguf_header.read(path).data_offset
    generator = random.Random(0)
    for _ in range(20_000 if soak else 1_000):
        changed = bytearray(content)
        for _ in range(generator.randint(1, 8)):
            changed[generator.randrange(begin)] = generator.randrange(256)
        (tmp_path / "odd.gguf").write_bytes(changed)
        read_or_refuse(tmp_path / "odd.gguf")


@pytest.mark.parametrize(
    "lie", ["2^63 entries", "an array of 2^62 strings", "2^32 - 1 dimensions", "an alignment of 2^31"]
)
def test_loading_it_fails_soon_with_a_sentence(lie, tmp_path, monkeypatch):
    monkeypatch.setenv("UNSLOTH_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model.gguf").write_bytes(LIES[lie])
    began = time.monotonic()
    with pytest.raises(UnslothError, match=r"model\.gguf is damaged, or not a true GGUF file"):
        FastLanguageModel.from_pretrained(str(tmp_path), gguf_file="model.gguf")
    assert time.monotonic() - began < 5
    assert not (tmp_path / "cache" / "gguf").exists()


def test_the_child_stays_within_its_memory(tmp_path):
    """Sixty million true numbers: more than the child may hold as Python objects."""
    count = 2**24 // 2
    rest = b"".join(entry(b"a%d" % n, 9, struct.pack("<IQ", 0, count) + b"\xff" * count) for n in range(8))
    path = tmp_path / "large.gguf"
    path.write_bytes(header(entries=8, rest=rest))
    with pytest.raises(CheckpointError, match="too much"):
        gguf.inspect(path)
