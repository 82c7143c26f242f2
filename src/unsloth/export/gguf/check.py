"""The proof that a GGUF file is the model it was made from, made before the file gets its name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from gguf import Keys
from gguf.quants import dequantize
from transformers import PreTrainedTokenizerBase

from unsloth.core.errors import ExportError, TokenizerError
from unsloth.export import verify
from unsloth.export.gguf import methods, runtime
from unsloth.export.gguf.convert import Conversion
from unsloth.export.gguf.file import Planned, Reader
from unsloth.export.gguf.metadata import Metadata
from unsloth.export.gguf.vocabulary import Vocabulary
from unsloth.models import gguf_header
from unsloth.models.record import transformers_model

TEXTS = (
    *verify.SAMPLES,
    "Grüße aus Zürich, naïve café: ÀÉÎÕÜ ß æ 'don't' I'LL we've",
    "Здравствуй, мир! Привет из Москвы; 2024-й год, 3,14159.",
    "你好，世界。今天是2024年11月24日，天气很好！ こんにちは世界、テスト。 안녕하세요 세계",
    "مرحبا بالعالم ١٢٣ नमस्ते दुनिया สวัสดีชาวโลก",
    "tabs\tand  double  spaces\n\n\nthree newlines \r\n windows   \n  indented\n    more",
    "🙂🚀 👩‍👩‍👧 e\u0301 ﬁ ½ ² ™ “quotes” — dash… x=1234567890 $9.99 50% #tag @me a_b/c\\d <b>&amp;</b>",
)
"""Texts that both tokenizers must cut alike: scripts, numbers, spaces, signs, and endings of words."""

_TALK = (
    {"role": "user", "content": "Name two rivers."},
    {"role": "assistant", "content": "The Rhine and the Po."},
    {"role": "user", "content": "And a lake?"},
)
_ROWS = 16  # of each tensor are dequantized


@dataclass(frozen=True)
class Proof:
    """What was checked of one file, and what was found.

    Attributes:
        tensors: Number of tensors whose name, shape and type were compared.
        types: How many tensors have each type.
        replaced: Tensors whose width did not allow their method's type: name, type of the method, type they have.
        largest_error: Largest relative error of the sampled rows of a quantized tensor.
        engine: What ran the file; None where llama.cpp is not installed.
        comparison: Its logits against the model's.
        not_checked: What could not be checked, and why; what a reader of the file does otherwise than the model.
    """

    tensors: int
    types: dict[str, int]
    replaced: list[tuple[str, str, str]]
    largest_error: float
    engine: str | None
    comparison: verify.Comparison | None
    not_checked: list[str]

    def __str__(self) -> str:
        types = ", ".join(f"{count} {name}" for name, count in sorted(self.types.items(), key=lambda t: -t[1]))
        found = f"llama.cpp ({self.engine}): {self.comparison}" if self.comparison else "; ".join(self.not_checked)
        return f"{self.tensors} tensors ({types}); {found}"

    def as_json(self) -> dict[str, Any]:
        """For the manifest."""
        return asdict(self)


@dataclass(frozen=True)
class Reference:
    """What the model and its tokenizer say, once for all files.

    Attributes:
        ids: Tokens of the sample texts.
        logits: Of the model at all of them, float32 [T, V].
        tokens: Ids of every text of :data:`TEXTS`.
        chat: A conversation as the chat template writes it, or None.
        chat_tokens: Its ids.
        end: Id of the token that ends an answer, or None.
        words: The vocabulary as it is written.
        same: Whether the model computes what was merged; if not (a scaled DoRA, for instance), the logits are those
            of the model as it was trained, and no limit applies.
    """

    ids: list[list[int]]
    logits: torch.Tensor
    tokens: list[list[int]]
    chat: str | None
    chat_tokens: list[int]
    end: int | None
    words: Vocabulary
    same: bool = True


def reference(conversion: Conversion, tokenizer: PreTrainedTokenizerBase, end: int | None) -> Reference:
    """Run the model, as it is merged, on the sample texts."""
    tokens = [tokenizer(text).input_ids for text in TEXTS]
    ids = [ids for ids in tokens[: len(verify.SAMPLES)] if ids]
    with verify.as_merged(conversion.model, conversion.options) as same:
        logits = _logits(conversion.model, ids)
    chat, chat_tokens = None, []
    if tokenizer.chat_template:
        chat = str(tokenizer.apply_chat_template(list(_TALK), tokenize=False, add_generation_prompt=True))
        chat_tokens = tokenizer(chat, add_special_tokens=False).input_ids
    return Reference(ids, logits, tokens, chat, chat_tokens, end, conversion.vocabulary, same)


@torch.no_grad()
def _logits(model: torch.nn.Module, ids: Sequence[Sequence[int]]) -> torch.Tensor:
    """Float32 logits [T, V] on the CPU of all tokens of all texts."""
    where = transformers_model(model).device
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        found = [model(input_ids=torch.tensor([each], device=where), use_cache=False).logits[0] for each in ids]
    finally:
        for module, mode in training.items():
            module.training = mode
    return torch.cat([logits.float().cpu() for logits in found])


def structure(paths: Sequence[Path], planned: Sequence[Planned], expected: Metadata) -> None:
    """Reopen a file, or its shards, and compare tensors and metadata with what was to be written.

    Raises:
        ExportError: Names the first difference.
    """
    headers = [gguf_header.read(path) for path in paths]
    there = {t.name: (t.shape, t.type) for header in headers for t in header.tensors}
    wanted = {tensor.name: (tensor.shape, int(tensor.type)) for tensor in planned}
    for name in wanted.keys() | there.keys():
        if there.get(name) != wanted.get(name):
            raise ExportError(f"the written file has {name} as {there.get(name)}, not {wanted.get(name)}")
    written = headers[0].metadata
    for key, (value, _) in expected.entries.items():
        if key == Keys.General.FILE_TYPE:
            continue
        same = np.allclose(written.get(key, np.nan), value) if isinstance(value, float) else written.get(key) == value
        if not same and key != Keys.Tokenizer.SCORES:
            raise ExportError(f"the written file says something else about {key}", got=written.get(key))


def values(source: Reader, paths: Sequence[Path]) -> float:
    """Dequantize the first rows of every tensor and compare them with the unquantized file.

    Returns:
        The largest relative error, ``norm(q - x) / norm(x)``.

    Raises:
        ExportError: A tensor has nothing in common with its source.
    """
    originals = {tensor.name: tensor for tensor in source}
    largest = 0.0
    for path in paths:
        reader = Reader(path)
        for tensor in reader:
            if tensor.type == originals[tensor.name].type:
                continue
            rows = min(_ROWS, int(np.prod(tensor.shape[:-1])))
            exact = source.float32(originals[tensor.name]).reshape(-1, tensor.shape[-1])[:rows]
            raw = reader.raw(tensor)
            found = _floats(raw[: raw.size // int(np.prod(tensor.shape[:-1])) * rows].reshape(rows, -1), tensor.type)
            error = float(np.linalg.norm(found - exact) / max(float(np.linalg.norm(exact)), 1e-30))
            if not error < 1.0:
                raise ExportError(f"the quantized values of {tensor.name} are not those of the model", got=error)
            largest = max(largest, error)
    return largest


def _floats(raw: np.ndarray, kind: int) -> np.ndarray:
    if Type(kind) in (Type.F32, Type.F16):
        return raw.view(np.float32 if kind == Type.F32 else np.float16).astype(np.float32)
    return dequantize(raw, Type(kind))


def running(path: Path, wanted: Reference, limit: float | None, adapter: Path | None = None) -> verify.Comparison:
    """Run the file with llama.cpp, and compare tokens, end and logits.

    Args:
        path: The file, or its first shard.
        wanted: From :func:`reference`.
        limit: Largest median KL divergence in nats; None for any that is finite.
        adapter: A LoRA adapter to run it with.

    Raises:
        ExportError: It does not load, or predicts something else.
        TokenizerError: It cuts texts otherwise, or stops at another token.
    """
    texts = list(TEXTS)
    answer = runtime.ask(runtime.Request(path, ids=wanted.ids, texts=texts, adapter=adapter))
    for text, ours, theirs in zip(texts, wanted.tokens, answer.tokens, strict=True):
        if not wanted.words.is_known_gap(text):
            _same_tokens(text, ours, theirs)
    if wanted.chat is not None:
        chat = runtime.ask(runtime.Request(path, texts=[wanted.chat], special=False))
        _same_tokens(wanted.chat, wanted.chat_tokens, chat.tokens[0])
    if wanted.end is not None and wanted.end not in answer.ends:
        raise TokenizerError("llama.cpp would not stop at the model's end of text", got=wanted.end)
    comparison = verify.compare(wanted.logits, torch.cat(answer.logits))
    largest = limit if limit is not None and wanted.same else np.inf
    if not np.isfinite(comparison.mean_kl) or not comparison.median_kl <= largest:
        raise ExportError(
            f"llama.cpp does not predict what the model does ({comparison})",
            do="Nothing was kept. Please report this with the model's name.",
        )
    return comparison


def _same_tokens(text: str, ours: list[int], theirs: list[int]) -> None:
    if ours == theirs:
        return
    place = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    raise TokenizerError(
        f"llama.cpp cuts a text into other tokens than the tokenizer, from token {place} of {text[:40]!r} on",
        got=f"{theirs[place : place + 4]} instead of {ours[place : place + 4]}",
        do='Name the way in which words are cut with pre_tokenizer="...", or save without tokenizer checks'
        " by verify=False.",
    )


def count(planned: Sequence[Planned]) -> dict[str, int]:
    """How many tensors have each type."""
    found: dict[str, int] = {}
    for tensor in planned:
        found[tensor.type.name] = found.get(tensor.type.name, 0) + 1
    return found


def limit_of(method: methods.Method) -> float | None:
    """The divergence beyond which a file of this method cannot be right; None where quantizing may cost any."""
    return verify.MEDIAN_KL_LIMIT if method.type in methods.PLAIN else None
