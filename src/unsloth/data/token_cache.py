"""Prepared data sets on the disk, found again by the content of the rows, the tokenizer and the options.

What a data set is called, where it lies and when it was written make no difference; one changed character does. The
newest few are kept.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import fields
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from unsloth.core import artifact, settings
from unsloth.core.errors import StorageError
from unsloth.core.log import get_logger
from unsloth.data import fingerprint
from unsloth.data.encode import PrepareOptions
from unsloth.data.json_rows import JsonLines
from unsloth.data.passes import of_table

_KEPT = 16
_FILE = "tokens.arrow"
_WITHOUT_EFFECT = ("num_proc", "outlines", "cache", "formatting")

logger = get_logger(__name__)


def folder() -> Path:
    """Where prepared data sets are kept."""
    return settings.cache_folder() / "tokens"


def key(rows: Any, tokenizer: PreTrainedTokenizerBase, options: PrepareOptions) -> str | None:
    """What the result depends on, as a hexadecimal number; None if it cannot be told.

    It cannot for a formatting function, a tokenizer without a fast implementation, and rows that are neither in a
    ``datasets.Dataset`` nor in a file nor JSON.
    """
    content = _content(rows)
    if content is None or options.formatting is not None or not tokenizer.is_fast:
        return None
    template = json.dumps(tokenizer.chat_template)
    said = {field.name: repr(getattr(options, field.name)) for field in fields(options)}
    parts = [
        sys.modules["unsloth"].__version__,
        *(metadata.version(name) for name in ("tokenizers", "transformers")),
        content,
        tokenizer.backend_tokenizer.to_str(),
        template,
        json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str),
        json.dumps({name: value for name, value in said.items() if name not in _WITHOUT_EFFECT}, sort_keys=True),
        date.today().isoformat() if "strftime_now" in template else "",
    ]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part.encode("utf-8", "surrogatepass")).digest())
    return digest.hexdigest()


def find(number: str) -> tuple[Dataset, Mapping[str, Any]] | None:
    """The data set kept under a key, mapped from the disk, and what was said of it; None if there is none.

    A damaged one is none, which is said in the log.
    """
    place = folder() / number
    if not place.is_dir():
        return None
    try:
        damage = artifact.verify(place)
        manifest = artifact.read_manifest(place)
    except StorageError as error:
        damage, manifest = [str(error)], None
    if damage or manifest is None:
        logger.warning("a prepared data set in the cache is damaged and is made anew: %s", "; ".join(damage))
        return None
    table = pa.ipc.open_stream(pa.memory_map(str(place / _FILE))).read_all()
    return of_table(table), dict(manifest["details"])


def keep(number: str, dataset: Dataset, said: Mapping[str, Any]) -> None:
    """Keep a data set under a key; of more than a few the oldest go."""
    table = dataset.with_format("arrow")
    with artifact.stage(folder() / number, kind="tokens", details=said, existing="overwrite") as staging:
        schema = table[:1].schema.remove_metadata()
        with pa.ipc.new_stream(str(staging / _FILE), schema) as writer:
            for batch in table.iter(10_000):
                writer.write_table(batch.replace_schema_metadata())
    kept = sorted((path for path in folder().iterdir() if (path / artifact.MANIFEST).is_file()), key=_written)
    for old in kept[:-_KEPT]:
        artifact.retire(old)


def _written(place: Path) -> float:
    return (place / artifact.MANIFEST).stat().st_mtime


def _content(rows: Any) -> str | None:
    if isinstance(rows, Dataset):
        return f"data set {fingerprint.of(rows).sha256}"
    if isinstance(rows, JsonLines):
        return f"file {artifact.sha256(rows.path)}"
    digest = hashlib.sha256()
    try:
        for row in rows:
            digest.update(json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
    except (TypeError, ValueError):
        return None
    return f"rows {digest.hexdigest()}"
