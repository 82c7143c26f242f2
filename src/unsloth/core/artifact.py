"""Folders that are whole or absent: stage, write, sync, record, rename.

Every folder this library commits goes through :func:`stage`. The caller writes into a hidden sibling of the
target; only when the block ends without an exception are the files flushed to the disk, listed with their size
and SHA-256 in ``manifest.json``, and moved to the target's name in one step. A reader sees the old folder or the
new one, never a mixture, and a killed process leaves at most a hidden staging folder, which the next save into
the same place removes.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import re
import shutil
import socket
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError

from unsloth.core.errors import StorageError
from unsloth.core.log import get_logger

MANIFEST = "manifest.json"
_HASHED_AT_ONCE = 4
_FORMAT = 2  # 1 had no checksum of its own
_RENAME_EXCHANGE = 2  # linux/fs.h
_AT_FDCWD = -100  # fcntl.h

logger = get_logger(__name__)


@dataclass(frozen=True)
class FileRecord:
    """One file of a committed folder: its POSIX path in the folder, size in bytes, and SHA-256 in hexadecimal."""

    name: str
    size: int
    sha256: str


@contextlib.contextmanager
def stage(
    target: str | os.PathLike[str],
    *,
    kind: str,
    details: Mapping[str, Any] | None = None,
    existing: Literal["replace", "overwrite", "extend"] = "replace",
    needed_bytes: int = 0,
) -> Iterator[Path]:
    """Yield an empty folder to write into; commit it as ``target`` when the block ends without an exception.

    Args:
        target: The folder to create. Missing parents are created.
        kind: What the folder is ("adapter", "merged_16bit"); written to the manifest.
        details: Further JSON values for the manifest. May be filled by the caller until the block ends.
        existing: What to do with a folder that is already there. ``"replace"`` replaces it whole, and refuses if
            it holds files that no manifest of ours lists; ``"overwrite"`` replaces it whatever it holds;
            ``"extend"`` keeps the files that are not written anew.
        needed_bytes: Space that the result will take; checked before anything is written.

    Raises:
        StorageError: The target is a file or holds foreign files, or the disk is full or read-only. Nothing of
            the target was changed, and no staging folder is left behind.
    """
    target = Path(os.path.realpath(Path(target).expanduser()))
    with readable_os_errors(target, needed_bytes):
        target.parent.mkdir(parents=True, exist_ok=True)
        _check_target(target, existing)
        _remove_abandoned(target)
        check_space(target.parent, needed_bytes)
        staging = target.parent / f"{_staging_prefix(target)}{_owner_tag()}-{uuid.uuid4().hex[:8]}"
        staging.mkdir()
    try:
        with readable_os_errors(target, needed_bytes):
            yield staging
            if existing == "extend" and target.is_dir():
                _carry_over(target, staging)
            write_manifest(staging, kind=kind, details=details or {})
            _sync_tree(staging)
            _swap_in(staging, target)
            _sync(target.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_manifest(folder: Path, *, kind: str, details: Mapping[str, Any]) -> list[FileRecord]:
    """Write ``manifest.json``, which lists every other file in ``folder``, and return its records.

    Folders inside it that have a manifest of their own (checkpoints in an output folder) are not listed.
    """
    own = {p.parent for p in folder.rglob(MANIFEST)} - {folder}
    paths = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and path != folder / MANIFEST
        and own.isdisjoint(path.parents)
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    with ThreadPoolExecutor(_HASHED_AT_ONCE) as pool:
        sums = list(pool.map(sha256, paths))
    records = [
        FileRecord(path.relative_to(folder).as_posix(), path.stat().st_size, checksum)
        for path, checksum in zip(paths, sums, strict=True)
    ]
    content = {
        "format": _FORMAT,
        "kind": kind,
        "details": dict(details),
        "files": [asdict(record) for record in records],
    }
    content["checksum"] = _checksum(json.loads(json.dumps(content)))
    (folder / MANIFEST).write_text(_text(content))
    return records


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The folder's manifest as a mapping, or None if it has none.

    Raises:
        StorageError: The file is there but is damaged, or is not a manifest of ours.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        text = path.read_text()
        content = json.loads(text)
        if content["format"] not in (1, _FORMAT):
            raise ValueError(content["format"])
        if content["format"] != 1 and (text != _text(content) or content.pop("checksum") != _checksum(content)):
            raise ValueError("checksum")
        content["files"] = [FileRecord(**record) for record in content["files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(
            "damaged or foreign manifest", got=path, do="Delete it if the folder comes from elsewhere."
        ) from error
    return content


def verify(folder: Path) -> list[str]:
    """Compare a folder with its manifest; return one sentence for every file that differs, none if all is well."""
    manifest = read_manifest(folder)
    if manifest is None:
        return [f"{folder} has no {MANIFEST}"]
    problems = []
    for record in manifest["files"]:
        path = folder / record.name
        if not path.is_file():
            problems.append(f"{record.name} is missing")
        elif path.stat().st_size != record.size:
            problems.append(f"{record.name} has {path.stat().st_size:,} bytes instead of {record.size:,}")
        elif sha256(path) != record.sha256:
            problems.append(f"{record.name} has the right size but another content (SHA-256 differs)")
    return problems


def _text(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"


def _checksum(content: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest's values, so that a damaged manifest is told from a true one."""
    values = {key: value for key, value in content.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def sha256(path: Path) -> str:
    """SHA-256 of a file in hexadecimal, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_space(folder: Path, needed_bytes: int) -> None:
    """Raise :class:`StorageError` unless ``folder``'s file system has ``needed_bytes`` free."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise StorageError(
            f"not enough disk space in {folder}: {needed_bytes:,} bytes needed, {free:,} free",
            do="Free some space or choose another folder.",
        )


@contextlib.contextmanager
def readable_os_errors(target: Path, needed_bytes: int = 0) -> Iterator[None]:
    """Turn the operating system's refusals about the target into :class:`StorageError`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = _errno(error)
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            free = shutil.disk_usage(_nearest_existing(target)).free
            needed = f"{needed_bytes:,} bytes needed, " if needed_bytes else ""
            reason = "the disk became full" if number == errno.ENOSPC else os.strerror(number)
            raise StorageError(
                f"{reason} while writing {target} ({needed}{free:,} bytes free)",
                do="Nothing of the target was changed. Free some space, or choose another folder, and save again.",
            ) from error
        if number in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG):
            raise StorageError(
                f"cannot write {target} ({os.strerror(number)})", do="Choose a folder that you can write to."
            ) from error
        raise


def _errno(error: OSError | SafetensorError) -> int | None:
    """The system's error number; safetensors has it in its message only."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"os error (\d+)", str(error))
    return int(found[1]) if found else None


def _check_target(target: Path, existing: str) -> None:
    if target.exists() and not target.is_dir():
        raise StorageError("the target is a file, not a folder", got=target, do="Choose another folder name.")
    if existing != "replace" or not target.is_dir():
        return
    manifest = read_manifest(target)
    ours = {record.name for record in manifest["files"]} | {MANIFEST} if manifest else set()
    foreign = sorted(
        path.relative_to(target).as_posix()
        for path in target.rglob("*")
        if path.is_file() and path.relative_to(target).as_posix() not in ours
    )
    if foreign:
        raise StorageError(
            f"the target folder {target} holds files that this save did not make ({', '.join(foreign[:3])}"
            f"{', ...' if len(foreign) > 3 else ''})",
            do="Choose an empty or new folder, or move those files away.",
        )


def _owner_tag() -> str:
    return f"{socket.gethostname()}-{os.getpid()}"


def _staging_prefix(target: Path) -> str:
    """The start of the names of a target's staging folders, short enough for names of 255 bytes."""
    return f".{os.fsdecode(os.fsencode(target.name)[:100])}.stage-"


def _remove_abandoned(target: Path) -> None:
    """Delete staging folders of this target whose process, on this host, no longer runs."""
    prefix = f"{_staging_prefix(target)}{socket.gethostname()}-"
    for path in target.parent.iterdir():
        pid = path.name.removeprefix(prefix).split("-")[0]
        if path.name.startswith(prefix) and pid.isdigit() and not _is_running(int(pid)):
            logger.info("removing %s, left behind by a save that was killed", path)
            shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def utf8_path(folder: Path) -> Iterator[Path]:
    """A path to an existing folder for libraries that only open names in UTF-8, whatever its real name is."""
    try:
        os.fsencode(folder).decode()
    except UnicodeDecodeError:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            yield Path(f"/proc/self/fd/{descriptor}")
        finally:
            os.close(descriptor)
    else:
        yield folder


def retire(folder: Path) -> None:
    """Delete a folder such that no reader finds half of it under its name: it is renamed first."""
    hidden = folder.with_name(f".{folder.name}.retired-{uuid.uuid4().hex[:8]}")
    folder.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def remove_leftovers(parent: Path, name: str) -> None:
    """Delete what killed saves and deletions left of targets named ``name*`` in ``parent``.

    For a caller who holds a lock on ``parent``: whatever process they belonged to, it is not at work any more.
    """
    pattern = re.compile(rf"\.{re.escape(name)}.*\.(stage|retired)-")
    for path in parent.iterdir():
        if pattern.match(path.name):
            logger.info("removing %s, left behind by a run that was killed", path)
            shutil.rmtree(path, ignore_errors=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _carry_over(source: Path, staging: Path) -> None:
    """Link (or copy) the source's files into the staging folder, except those written anew."""
    for path in sorted(p for p in source.rglob("*") if p.is_file()):
        copy = staging / path.relative_to(source)
        if copy.exists() or path == source / MANIFEST:
            continue
        copy.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, copy)
        except OSError:  # a file system without hard links
            shutil.copy2(path, copy)


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _swap_in(staging: Path, target: Path) -> None:
    """Give ``staging`` the target's name; an older target is exchanged for it and then deleted."""
    if not target.exists():
        staging.rename(target)
        return
    if not _exchange(staging, target):
        retired = staging.with_name(f"{staging.name}-old")
        target.rename(retired)
        try:
            staging.rename(target)
        except OSError:
            retired.rename(target)
            raise
        shutil.rmtree(retired)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two paths in one system call; False where the kernel or file system has none."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    done = renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0
    if not done and ctypes.get_errno() not in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(second))
    return done


def _nearest_existing(path: Path) -> Path:
    return next(p for p in (path, *path.parents) if p.exists())
