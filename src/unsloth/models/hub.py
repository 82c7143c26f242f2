"""Repositories of the model hub: which files a model needs, downloaded whole, and refusals explained."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import huggingface_hub.errors as hub_errors
from huggingface_hub import HfApi

from unsloth.core import artifact, settings
from unsloth.core.errors import CheckpointError, ModelError, ModelNotFoundError, NetworkError
from unsloth.core.log import get_logger
from unsloth.models import weight_files

_ANSWER_WITHIN = 10.0  # seconds
_AT_ONCE = 8
_SMALL_FILES = (".json", ".jinja", ".model", ".txt", ".tiktoken")

logger = get_logger(__name__)


@dataclass(frozen=True)
class Request:
    """What to fetch of a repository.

    Attributes:
        name: Hub id.
        revision: Branch, tag or commit; None means the main branch.
        token: Hub token.
        subfolder: Folder of the repository that holds the model.
        gguf_file: The one weight file to fetch, instead of safetensors.
        weights: Whether to fetch weights, or the configuration and tokenizer only.
        code: Whether to fetch Python files too.
        cache_dir: The hub cache; None means the usual one.
        local_files_only: Use the cache, not the network.
        force_download: Fetch what is in the cache already.
    """

    name: str
    revision: str | None = None
    token: str | bool | None = None
    subfolder: str = ""
    gguf_file: str | None = None
    weights: bool = True
    code: bool = False
    cache_dir: str | None = None
    local_files_only: bool = False
    force_download: bool = False


def fetch(request: Request) -> Path:
    """Download what a model or adapter needs, or find it in the cache; return its folder.

    One short request asks first whether the repository may be read, so that a refusal is known at once. Every
    file's size is compared with the hub's, and the content (SHA-256) of those just downloaded. Interrupted
    downloads are resumed by the next call. Without a connection, the copy in the cache is used.

    Raises:
        ModelNotFoundError: No such repository or revision, or it may not be read.
        NetworkError: The hub does not answer and the cache has no copy.
        CheckpointError: The repository holds no safetensors weights, or a file arrived damaged.
    """
    if settings.offline() or request.local_files_only:
        return _cached(request, None)
    try:
        info = HfApi().model_info(
            request.name,
            revision=request.revision,
            token=request.token,
            timeout=_ANSWER_WITHIN,
            files_metadata=True,
        )
    except request_errors() as error:
        refused = explain(request.name, error)
        if isinstance(refused, NetworkError):
            return _cached(request, refused)
        raise refused from error
    listed = {sibling.rfilename: sibling for sibling in info.siblings or ()}
    known = {name for name in listed if _in_cache(request, name, info.sha)}
    names = _first_files(request, listed)
    folder = _download(request, names)
    if request.weights and request.gguf_file is None:
        names += _weights(request, listed, folder)
        folder = _download(request, names)
    _check_downloads(request, folder, [listed[name] for name in names if name in listed], known)
    return folder / request.subfolder


def explain(name: str, error: BaseException) -> ModelError:
    """Say in one sentence why a repository could not be read; walks the chain of causes for the real reason."""
    causes = list(_chain(error))
    for kind, explanation in _REFUSALS:
        if any(isinstance(cause, kind) for cause in causes):
            return explanation(name)
    for cause in causes:
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if isinstance(status, int) and status >= 400:
            return _by_status(name, status)
    if any(isinstance(cause, _NO_CONNECTION) for cause in causes):
        return _unreachable(name)
    if settings.offline() or any(isinstance(cause, transport_error()) for cause in causes):
        return _unreachable(name)
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return ModelError(f"'{name}' could not be loaded: {reason}")


def _chain(error: BaseException) -> Iterable[BaseException]:
    seen: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in seen:
        seen.append(cause)
        cause = cause.__cause__ or cause.__context__
    return seen


def transport_error() -> type[Exception]:
    """The base of connection errors in the HTTP library that this version of huggingface_hub uses."""
    library = type(huggingface_hub.get_session()).__module__.partition(".")[0]
    return importlib.import_module(library).TransportError


def request_errors() -> tuple[type[Exception], ...]:
    """What a request to the hub may raise."""
    return (OSError, hub_errors.HfHubHTTPError, hub_errors.HFValidationError, transport_error())


def _cached(request: Request, refused: ModelError | None) -> Path:
    """The folder in the cache; raise ``refused``, or that there is none."""
    try:
        folder = huggingface_hub.snapshot_download(
            request.name, revision=request.revision, cache_dir=request.cache_dir, local_files_only=True
        )
    except (hub_errors.LocalEntryNotFoundError, hub_errors.HFValidationError) as error:
        raise refused or explain(request.name, error) from error
    if refused is not None:
        logger.warning("%s The copy in the cache is used.", refused)
    return Path(folder) / request.subfolder


def _first_files(request: Request, listed: Iterable[str]) -> list[str]:
    """Configuration, tokenizer and index, which decide what weights are needed; or the GGUF file."""
    if request.gguf_file is not None:
        if request.gguf_file in listed:
            return [request.gguf_file]
        there = sorted(name for name in listed if name.endswith(".gguf"))
        raise ModelNotFoundError(
            f"'{request.name}' has no such GGUF file",
            got=request.gguf_file,
            do=f"There are: {', '.join(there[:5])}." if there else "It has no GGUF file at all.",
        )
    prefix = f"{request.subfolder}/" if request.subfolder else ""
    inside = [name for name in listed if name.startswith(prefix) and "/" not in name.removeprefix(prefix)]
    small = [name for name in inside if name.endswith(_SMALL_FILES)]
    if not small:
        raise CheckpointError(f"'{request.name}' holds no model: it has no config.json", do="Check its hub page.")
    return small + [name for name in listed if request.code and name.endswith(".py")]


def _weights(request: Request, listed: Iterable[str], folder: Path) -> list[str]:
    """The weight files of a model or adapter, by its index if there is one."""
    prefix = f"{request.subfolder}/" if request.subfolder else ""
    available = set(listed)
    if f"{prefix}adapter_config.json" in available:
        weights = ["adapter_model.safetensors"]
    elif f"{prefix}{weight_files.INDEX}" in available and f"{prefix}{weight_files.SINGLE}" not in available:
        weights = weight_files.listed_in(folder / prefix / weight_files.INDEX)
    else:
        weights = [weight_files.SINGLE]
    absent = [name for name in weights if prefix + name not in available]
    if absent and any(name.endswith((".bin", ".pt", ".pth")) for name in available):
        raise weight_files.pickled(f"the repository {request.name}")
    if absent:
        raise CheckpointError(
            f"'{request.name}' has no {absent[0]}",
            do="Name a repository with safetensors weights, or a GGUF file in it with gguf_file=.",
        )
    return [prefix + name for name in weights]


def _download(request: Request, names: list[str]) -> Path:
    """Fetch files into the cache, eight at a time; return the folder of the snapshot they are in."""

    def one(name: str) -> Path:
        path = huggingface_hub.hf_hub_download(
            request.name,
            name,
            revision=request.revision,
            token=request.token,
            cache_dir=request.cache_dir,
            force_download=request.force_download,
        )
        return Path(path).parents[name.count("/")]

    try:
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            folders = set(pool.map(one, names))
    except request_errors() as error:
        raise explain(request.name, error) from error
    if len(folders) != 1:
        raise NetworkError(f"'{request.name}' was changed while it was downloaded", do="Run this again.")
    return folders.pop()


def _in_cache(request: Request, name: str, commit: str | None) -> bool:
    found = huggingface_hub.try_to_load_from_cache(request.name, name, cache_dir=request.cache_dir, revision=commit)
    return isinstance(found, str) and not request.force_download


def _check_downloads(
    request: Request, folder: Path, files: Iterable[huggingface_hub.hf_api.RepoSibling], known: set[str]
) -> None:
    """Compare sizes, and the SHA-256 of what is new; a file that differs is removed from the cache."""
    for file in files:
        path = folder / file.rfilename
        size = path.stat().st_size if path.is_file() else 0
        problem = ""
        if file.size is not None and size != file.size:
            problem = f"{size:,} bytes instead of {file.size:,}"
        elif file.lfs is not None and file.rfilename not in known and artifact.sha256(path) != file.lfs.sha256:
            problem = "another content than the hub says (SHA-256 differs)"
        if problem:
            path.resolve().unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            raise CheckpointError(
                f"{file.rfilename} of '{request.name}' arrived with {problem}",
                do="It was deleted; run this again to download it once more.",
            )


def _by_status(name: str, status: int) -> ModelError:
    if status in (401, 403):
        return ModelNotFoundError(
            f"the hub refused access to this model (HTTP {status})",
            got=name,
            do="Pass a token that may read it: token=..., or log in with 'hf auth login'.",
        )
    if status == 404:
        return _not_found(name)
    if status == 429:
        return NetworkError(
            "the hub answered that there were too many requests (HTTP 429)",
            got=name,
            do="Wait some minutes, or pass your token=...; finished downloads are kept.",
        )
    return NetworkError(
        f"the hub has a problem of its own (HTTP {status})",
        got=name,
        do="Try again later, or name a local folder; finished downloads are kept.",
    )


def _not_found(name: str) -> ModelError:
    return ModelNotFoundError(
        "no such model on the hub, and no such folder here",
        got=name,
        do="Check the spelling; for a private model pass token=...",
    )


def _gated(name: str) -> ModelError:
    return ModelNotFoundError(
        "access to this model must be asked for on its hub page",
        got=name,
        do="Then pass your hub token as token=....",
    )


def _unreachable(name: str) -> ModelError:
    return NetworkError(
        "the model hub cannot be reached, and this model is not in the local cache",
        got=name,
        do="Check the network connection, or name a local folder.",
    )


def _no_such_revision(name: str) -> ModelError:
    return ModelNotFoundError("the model has no such revision", got=name, do="Check revision=...")


_REFUSALS: tuple[tuple[type[BaseException], Callable[[str], ModelError]], ...] = (
    (hub_errors.GatedRepoError, _gated),
    (hub_errors.RevisionNotFoundError, _no_such_revision),
    (hub_errors.RepositoryNotFoundError, _not_found),
    (hub_errors.HFValidationError, _not_found),
)
_NO_CONNECTION = (hub_errors.LocalEntryNotFoundError, hub_errors.OfflineModeIsEnabled, ConnectionError, TimeoutError)
