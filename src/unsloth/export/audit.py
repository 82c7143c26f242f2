"""Whether a saved model is the one it is said to be, and if not, in words, why.

An export proves itself before it gets its name (:mod:`unsloth.export.verify`, :mod:`unsloth.export.gguf.check`). This
is for files that come from elsewhere, or that were changed since: they are loaded by the engine that they are for, and
compared with the original in names and shapes of tensors, tokens, template, logits and a greedy answer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from gguf import Keys
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from unsloth.export import layout, merge, predict, verify
from unsloth.export.gguf import check, convert, methods, runtime
from unsloth.models import gguf, gguf_header, weight_files
from unsloth.models.record import transformers_model

_ANSWER = 16  # tokens
_NOT_EVEN_QUANTIZED = 3.0  # nats in the median, more than two bits cost a model that is large enough for them
_PLAIN = {int(method.file_type) for method in methods.METHODS if method.type in methods.PLAIN}
_LISTED = 3

Shapes = Mapping[str, Sequence[int]]


@dataclass
class Audit:
    """What was found.

    Attributes:
        problems: A sentence for each thing that is not as it should be; none if the file is the model.
        passed: What was compared and found alike.
        notes: What could not be compared, and why.
        comparison: Logits against the original's.
        answer: Share of the original's greedy answer that the other would give too.
    """

    problems: list[str] = field(default_factory=list)
    passed: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    comparison: verify.Comparison | None = None
    answer: float | None = None


def of_gguf(path: Path, model: Any, tokenizer: PreTrainedTokenizerBase) -> Audit:
    """Compare a GGUF file with the model that it should be.

    Args:
        path: The file, or the first of its shards.
        model: The original, with its adapters.
        tokenizer: Of the original.

    Raises:
        ExportError: llama.cpp does not have the original's architecture.
        TokenizerError: Nor its tokenizer.
        CheckpointError: Not a whole GGUF file.
    """
    found = Audit()
    conversion = convert.plan(model, tokenizer)
    shards = predict.shards(path)
    for shard in shards:
        gguf.inspect(shard)
    headers = [gguf_header.read(shard) for shard in shards]
    metadata = headers[0].metadata
    architecture = conversion.metadata.entries[Keys.General.ARCHITECTURE][0]
    if metadata.get(Keys.General.ARCHITECTURE) != architecture:
        found.problems.append(
            f"wrong base: the file is a {metadata.get(Keys.General.ARCHITECTURE)} model, the original is {architecture}"
        )
        return found
    there = {tensor.name: tensor.shape for header in headers for tensor in header.tensors}
    if not _tensors(found, there, {tensor.name: tensor.shape for tensor in conversion.planned}):
        return found
    _template(found, metadata.get(Keys.Tokenizer.CHAT_TEMPLATE), tokenizer)
    if runtime.available() is None:
        found.notes.append('logits and tokens are not compared: llama.cpp is not installed (extra "gguf-run")')
        return found
    ends = convert.ends_of(transformers_model(model), tokenizer)
    wanted = check.reference(conversion, tokenizer, ends[0] if ends else None)
    prompt, answer = greedy(model, tokenizer)
    texts = [*check.TEXTS, *([wanted.chat] if wanted.chat is not None else [])]
    got = runtime.ask(runtime.Request(path, ids=[*wanted.ids, [*prompt, *answer]], texts=texts))
    if wanted.chat is not None:
        _beginning(found, got.tokens.pop(), wanted.chat_tokens, tokenizer, got.bos)
    _tokens(found, got.tokens, wanted, got.bos)
    if wanted.end is not None and wanted.end not in got.ends:
        found.problems.append(
            f"answers do not end: llama.cpp does not stop at {tokenizer.convert_ids_to_tokens(wanted.end)!r}"
        )
    limit = verify.MEDIAN_KL_LIMIT if metadata.get(Keys.General.FILE_TYPE) in _PLAIN else _NOT_EVEN_QUANTIZED
    logits, last = torch.cat(got.logits[:-1]), got.logits[-1]
    base = _base_logits(model, lambda: check.reference(conversion, tokenizer, None).logits)
    _logits(found, wanted.logits, logits, limit, base)
    _answer(found, answer, last)
    return found


def of_folder(folder: Path, model: Any, tokenizer: PreTrainedTokenizerBase) -> Audit:
    """Compare a folder of transformers' format with the model that it should be.

    Args:
        folder: A merged or plain model, which is loaded by plain transformers, without code of its own.
        model: The original, with its adapters.
        tokenizer: Of the original.
    """
    found = Audit()
    inner = transformers_model(model)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind, quantized = config.get("model_type"), "quantization_config" in config
    if kind != inner.config.model_type:
        found.problems.append(f"wrong base: the folder has a {kind} model, the original is {inner.config.model_type}")
        return found
    there = {
        name: header.shape
        for file in folder.glob("*.safetensors")
        for name, header in weight_files.check_file(file).items()
    }
    planned = {tensor.name: tensor.shape for tensor in layout.plan(merge.skeleton(model))}
    if quantized:
        found.notes.append("names and shapes of tensors are not compared: the folder is quantized")
    elif not _tensors(found, there, planned):
        return found
    other = AutoTokenizer.from_pretrained(folder)
    _template(found, other.chat_template, tokenizer)
    _folder_tokens(found, other, tokenizer)
    ids = [tokenizer(text).input_ids for text in verify.SAMPLES]
    prompt, answer = greedy(model, tokenizer)
    second = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map={"": inner.device}).eval()
    got = [_logits_of(second, each) for each in [*ids, [*prompt, *answer]]]
    limit = _NOT_EVEN_QUANTIZED if quantized else verify.MEDIAN_KL_LIMIT

    def own() -> torch.Tensor:
        return torch.cat([_logits_of(model, each) for each in ids])

    _logits(found, own(), torch.cat(got[:-1]), limit, _base_logits(model, own))
    _answer(found, answer, got[-1])
    return found


def greedy(model: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """A question as the chat template writes it (or a plain text), and the beginning of the model's greedy answer."""
    if tokenizer.chat_template:
        question = [{"role": "user", "content": "Name two rivers and a lake."}]
        text = str(tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True))
        prompt = tokenizer(text, add_special_tokens=False).input_ids
    else:
        prompt = tokenizer(verify.SAMPLES[0]).input_ids
    answer: list[int] = []
    for _ in range(_ANSWER):
        answer.append(int(_logits_of(model, [*prompt, *answer])[-1].argmax()))
    return prompt, answer


def _tensors(found: Audit, there: Shapes, planned: Shapes) -> bool:
    """Compare names and shapes; whether the file can be loaded at all."""
    missing = sorted(planned.keys() - there.keys())
    other = sorted(name for name in planned.keys() & there.keys() if tuple(there[name]) != tuple(planned[name]))
    more = sorted(there.keys() - planned.keys())
    if missing:
        found.problems.append(f"missing tensors ({len(missing)}): {_some(missing)}")
    if other:
        first = other[0]
        found.problems.append(
            f"wrong base: {len(other)} tensors have another shape, such as {first}: {list(there[first])} instead of "
            f"{list(planned[first])}"
        )
    if more:
        found.problems.append(f"tensors that the original does not have ({len(more)}): {_some(more)}")
    if not missing and not other:
        found.passed.append(f"names and shapes of {len(planned)} tensors")
    return not missing and not other


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_LISTED]) + (", ..." if len(names) > _LISTED else "")


def _template(found: Audit, theirs: object, tokenizer: PreTrainedTokenizerBase) -> None:
    ours = tokenizer.chat_template
    if theirs == ours:
        found.passed.append("the chat template" if ours else "neither has a chat template")
    elif not theirs:
        found.problems.append("no chat template: engines will guess one, other than the model was trained with")
    elif not ours:
        found.problems.append("a chat template that the original does not have")
    else:
        a, b = str(theirs), str(ours)
        place = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        shown = slice(max(0, place - 12), place + 28)
        found.problems.append(
            f"wrong chat template: at character {place} it has {a[shown]!r}, the original {b[shown]!r}"
        )


def _beginning(found: Audit, theirs: list[int], ours: list[int], tokenizer: PreTrainedTokenizerBase, bos: int) -> None:
    """How a conversation begins where the engine adds the first token by itself."""
    if theirs[:2] == [bos, bos] and ours[:2] != [bos, bos]:
        found.notes.append(
            f"double BOS: the chat template writes {tokenizer.convert_ids_to_tokens(bos)!r} and the file asks for one "
            "before every text, as with the original; a program that adds both sees it twice (llama.cpp's does not)"
        )


def _tokens(found: Audit, theirs: Sequence[list[int]], wanted: check.Reference, bos: int) -> None:
    pairs = [
        (text, ours, other)
        for text, ours, other in zip(check.TEXTS, wanted.tokens, theirs, strict=True)
        if not wanted.words.is_known_gap(text)
    ]
    _compare_tokens(found, pairs, bos)


def _folder_tokens(found: Audit, other: PreTrainedTokenizerBase, tokenizer: PreTrainedTokenizerBase) -> None:
    pairs = [(text, tokenizer(text).input_ids, other(text).input_ids) for text in check.TEXTS]
    _compare_tokens(found, pairs, tokenizer.bos_token_id if tokenizer.bos_token_id is not None else -1)
    if other.eos_token_id != tokenizer.eos_token_id:
        found.problems.append(
            f"answers end at another token: {other.eos_token!r} instead of the original's {tokenizer.eos_token!r}"
        )


def _compare_tokens(found: Audit, pairs: Sequence[tuple[str, list[int], list[int]]], bos: int) -> None:
    for text, ours, theirs in pairs:
        if theirs == ours:
            continue
        if theirs == [bos, *ours]:
            found.problems.append("double BOS: a first token is put before every text, which the original does not do")
        elif [bos, *theirs] == ours:
            found.problems.append("missing BOS: the original puts a first token before every text, the file does not")
        else:
            place = next((i for i, (x, y) in enumerate(zip(ours, theirs, strict=False)) if x != y), len(theirs))
            found.problems.append(
                f"another tokenizer: {text[:40]!r} becomes other tokens, from token {place} on "
                f"{theirs[place : place + 4]} instead of {ours[place : place + 4]}"
            )
        return
    found.passed.append(f"tokens of {len(pairs)} texts")


def _base_logits(model: Any, compute: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor] | None:
    """A function that computes the logits of the model without its adapter; None for a model without one."""
    if not isinstance(model, PeftModel):
        return None

    def run() -> torch.Tensor:
        with model.disable_adapter():
            return compute()

    return run


def _logits(
    found: Audit, ours: torch.Tensor, theirs: torch.Tensor, limit: float, base: Callable[[], torch.Tensor] | None
) -> None:
    size = min(ours.shape[-1], theirs.shape[-1])
    found.comparison = comparison = verify.compare(ours[:, :size], theirs[:, :size])
    without = verify.compare(base()[:, :size], theirs[:, :size]) if base is not None else None
    if without is not None and without.mean_kl < comparison.mean_kl / 2:
        found.problems.append(
            f"the adapter is not in it: it predicts what the base does without the adapter ({without}), "
            f"rather than what the adapted model does ({comparison})"
        )
    elif not comparison.median_kl <= limit:
        found.problems.append(f"wrong base, or wrong values: its predictions are another model's ({comparison})")
    else:
        found.passed.append(f"predictions: {comparison}")


def _answer(found: Audit, answer: Sequence[int], logits: torch.Tensor) -> None:
    given = logits[-len(answer) - 1 : -1].argmax(-1).tolist()
    found.answer = sum(a == b for a, b in zip(answer, given, strict=True)) / len(answer)


@torch.no_grad()
def _logits_of(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """Float32 [T, V] on the CPU."""
    where = transformers_model(model).device
    return model(input_ids=torch.tensor([list(ids)], device=where), use_cache=False).logits[0].float().cpu()
