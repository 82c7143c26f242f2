"""Uploading a saved folder to the model hub: refusals known first, failures repeated, all files in one commit.

Weight files go to the hub's storage one after another, and are asked for by their SHA-256 first, so that an upload
that was cut goes on where it was, in this process or in another one. Nobody sees a half uploaded model: the files
appear with the commit at the end, and a model's weight files of an earlier upload that this one has not go with it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HFValidationError

from unsloth.core import artifact, settings
from unsloth.core.errors import ConfigError, StorageError, UploadError
from unsloth.core.log import get_logger
from unsloth.models import hub

_WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds before each further try
_PASSING = {408, 429, 500, 502, 503, 504}  # statuses that another try may not get
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")

Result = TypeVar("Result")

logger = get_logger(__name__)


@dataclass(frozen=True)
class Repository:
    """A repository that may be written to.

    Attributes:
        name: Its full name, ``"owner/name"``.
        url: Its address.
        api: The hub, with the token to use. Not shown.
    """

    name: str
    url: str
    api: HfApi

    def __repr__(self) -> str:
        return f"Repository({self.name!r})"


def folder_name(repo_id: str) -> str:
    """The folder for the local copy of a repository."""
    return repo_id.rpartition("/")[2]


def prepare(repo_id: str, token: str | bool | None = None, private: bool | None = None) -> Repository:
    """Find or make a repository, before anything is computed for it.

    Args:
        repo_id: ``"name"`` or ``"owner/name"``.
        token: Hub token; None takes the one of ``hf auth login``.
        private: Visibility of a new repository; None makes it private. An existing one stays as it is.

    Raises:
        ConfigError: Not a repository's name.
        UploadError: The token is wrong or may not write there, or the hub cannot be reached.
    """
    if settings.offline():
        raise UploadError("nothing can be uploaded while HF_HUB_OFFLINE is set", do="Unset it, or save to a folder.")
    api = HfApi(token=token or None)
    try:
        made = _again(partial(api.create_repo, repo_id, private=private is not False, exist_ok=True))
    except HFValidationError as error:
        raise ConfigError("not a repository's name", got=repo_id, do='Write it as "owner/name".') from error
    except _failures() as error:
        raise _refused(repo_id, error, "Nothing was computed or written yet.") from error
    return Repository(made.repo_id, str(made), api)


def upload(folder: Path, repository: Repository, message: str | None = None) -> str:
    """Upload a folder that this library wrote; return the repository's address.

    Args:
        folder: With its ``manifest.json``, by which it is checked first. Not changed.
        repository: From :func:`prepare`.
        message: Of the commit.

    Raises:
        StorageError: The folder is damaged or has no manifest.
        UploadError: The hub refused, or could not be reached after several tries. The message names the local copy.
    """
    problems = artifact.verify(folder)
    if problems:
        raise StorageError(f"{folder} cannot be uploaded: {problems[0]}", do="Save it again.")
    manifest = artifact.read_manifest(folder)
    names = [record.name for record in manifest["files"]] if manifest else []
    try:
        return _upload(folder, names, repository, message or "Upload a model saved with unsloth")
    except _failures() as error:
        raise _refused(
            repository.name,
            error,
            f"The local copy at '{folder}' is whole; upload again, and only what is missing is sent.",
        ) from error


def _upload(folder: Path, names: list[str], repository: Repository, message: str) -> str:
    api, name = repository.api, repository.name
    additions = [CommitOperationAdd(file, folder / file) for file in [*names, artifact.MANIFEST]]
    for number, addition in enumerate(additions, start=1):
        logger.debug("uploading %s (%d of %d)", addition.path_in_repo, number, len(additions))
        _again(partial(api.preupload_lfs_files, name, [addition], free_memory=False))
    there = _again(partial(api.list_repo_files, name))
    # An adapter that is uploaded beside a model replaces nothing of it.
    replaces = any(_WEIGHTS.fullmatch(file) for file in names)
    stale = [file for file in there if replaces and _WEIGHTS.fullmatch(file) and file not in names]
    operations: list[Any] = [*additions, *(CommitOperationDelete(file) for file in stale)]
    _again(partial(api.create_commit, name, operations, commit_message=message))
    logger.info("uploaded %d files to %s", len(additions), repository.url)
    return repository.url


def _again(request: Callable[[], Result]) -> Result:
    """Make a request, and make it again after a while if it failed in a way that may pass."""
    for wait in _WAITS:
        try:
            return request()
        except _failures() as error:
            if not _may_pass(error):
                raise
            logger.info("the hub did not answer as it should (%s); trying again in %.0f s", _short(error), wait)
            time.sleep(wait)
    return request()


def _failures() -> tuple[type[Exception], ...]:
    """What an upload may raise; RuntimeError comes from the hub's storage client (hf_xet)."""
    return (*hub.request_errors(), RuntimeError)


def _may_pass(error: BaseException) -> bool:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return status in _PASSING
    return isinstance(error, (ConnectionError, TimeoutError, RuntimeError, hub.transport_error()))


def _short(error: BaseException) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return type(error).__name__ if status is None else f"HTTP {status}"


def _refused(name: str, error: BaseException, state: str) -> UploadError:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return UploadError(
            "the hub does not know this token (HTTP 401)", do=f"Pass a token that may write: token=... {state}"
        )
    if status in (402, 403):
        return UploadError(
            f"this token may not write to '{name}' (HTTP {status})",
            do="Pass one with the right to write, or private=False if the account has no private repositories left. "
            + state,
        )
    if status is not None and status not in _PASSING:
        return UploadError(f"the hub refused the upload to '{name}' (HTTP {status})", do=state)
    return UploadError(
        f"the upload to '{name}' failed after {len(_WAITS) + 1} tries ({_short(error)})",
        do=f"Check the network. {state}",
    )
