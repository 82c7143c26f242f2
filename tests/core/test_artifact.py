import errno

import pytest

from unsloth.core import artifact
from unsloth.core.errors import StorageError


def test_a_folder_appears_whole_with_its_manifest(tmp_path):
    with artifact.stage(tmp_path / "out", kind="test", details={"step": 3}) as staging:
        (staging / "a.txt").write_text("hello")
        assert not (tmp_path / "out").exists()
    assert artifact.verify(tmp_path / "out") == []
    assert artifact.read_manifest(tmp_path / "out")["details"] == {"step": 3}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_failed_save_leaves_the_old_folder_and_nothing_else(tmp_path):
    with artifact.stage(tmp_path / "out", kind="test") as staging:
        (staging / "a.txt").write_text("old")
    with (
        pytest.raises(StorageError, match="disk became full"),
        artifact.stage(tmp_path / "out", kind="test") as staging,
    ):
        (staging / "a.txt").write_text("new")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert (tmp_path / "out" / "a.txt").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_extend_keeps_other_files_and_replace_refuses_them(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with artifact.stage(out, kind="test", existing="extend") as staging:
        (staging / "a.txt").write_text("1")
    assert (out / "notes.txt").read_text() == "mine"
    (out / "later.txt").write_text("mine too")
    with pytest.raises(StorageError, match="later.txt"), artifact.stage(out, kind="test"):
        pass


def test_too_little_space_and_a_file_in_the_way_are_refused_before_writing(tmp_path):
    (tmp_path / "file").write_text("x")
    for target, needed, message in (("out", 2**62, "bytes needed"), ("file", 0, "is a file")):
        with (
            pytest.raises(StorageError, match=message),
            artifact.stage(tmp_path / target, kind="t", needed_bytes=needed),
        ):
            raise AssertionError("the block must not run")


def test_verify_names_damaged_files(tmp_path):
    with artifact.stage(tmp_path / "out", kind="test") as staging:
        for name in "abc":
            (staging / name).write_text("12345")
    (tmp_path / "out" / "a").write_text("12346")
    (tmp_path / "out" / "b").write_text("123")
    (tmp_path / "out" / "c").unlink()
    problems = artifact.verify(tmp_path / "out")
    assert [p.split()[0] for p in problems] == ["a", "b", "c"]
