"""Training data from documents, under the name that documented snippets import."""

from __future__ import annotations

import json
import os
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unsloth.core import artifact
from unsloth.core.errors import DataError, NetworkError
from unsloth.data import documents, synthetic
from unsloth.data.synthetic import Generate, PairOptions, PairReport

__all__ = ["SyntheticDataKit"]


class SyntheticDataKit:
    """Turns documents into questions and answers, with a local model or a server that speaks OpenAI's protocol.

    Args:
        generate: Calls the model: prompts in, replies out.
        max_seq_length: Tokens that prompt and reply may have together; decides how large a piece of text is.
        max_generation_tokens: Tokens of a reply.
    """

    def __init__(self, generate: Generate, max_seq_length: int = 2048, max_generation_tokens: int = 512) -> None:
        self._generate = generate
        # About four characters a token, and a third of the room for instructions and for rating.
        self._chunk_size = max(200, (max_seq_length - max_generation_tokens) * 4 * 2 // 3)

    @classmethod
    def from_pretrained(
        cls, model_name: str, max_seq_length: int = 2048, max_generation_tokens: int = 512, **loading: Any
    ) -> SyntheticDataKit:
        """With a local model.

        Args:
            model_name: As in ``FastLanguageModel.from_pretrained``.
            max_seq_length: Tokens of prompt and reply together.
            max_generation_tokens: Tokens of a reply.
            **loading: Passed on to ``FastLanguageModel.from_pretrained``.
        """
        from unsloth.models.load import LoadOptions, choose_precision, load

        precision = choose_precision(
            *(loading.pop(name, None) for name in ("load_in_4bit", "load_in_8bit", "load_in_16bit", "full_finetuning"))
        )
        options = LoadOptions(model_name=model_name, max_seq_length=max_seq_length, precision=precision, **loading)
        model, tokenizer = load(options)
        return cls(_local(model, tokenizer, max_generation_tokens), max_seq_length, max_generation_tokens)

    @classmethod
    def from_endpoint(
        cls,
        url: str,
        model: str,
        api_key: str | None = None,
        max_seq_length: int = 8192,
        max_generation_tokens: int = 1024,
        timeout: float = 120.0,
    ) -> SyntheticDataKit:
        """With a server that speaks OpenAI's protocol.

        Args:
            url: Its base, such as ``"http://localhost:8000/v1"``.
            model: The model's name there.
            api_key: If it wants one.
            max_seq_length: Tokens of prompt and reply together.
            max_generation_tokens: Tokens of a reply.
            timeout: Seconds to wait for a reply.
        """
        generate = _remote(url, model, api_key, max_generation_tokens, timeout)
        return cls(generate, max_seq_length, max_generation_tokens)

    def chunk_data(self, filename: str | os.PathLike[str], overlap: int = 200) -> list[str]:
        """The text of a document in pieces, each repeating up to ``overlap`` characters of the one before.

        Args:
            filename: A file, or the address of a web page (``http://`` or ``https://``).
            overlap: Characters.

        Raises:
            DataError: The document cannot be read.
            NetworkError: The page could not be fetched.
        """
        return documents.chunks(documents.read_document(filename), self._chunk_size, overlap)

    def make_pairs(
        self,
        sources: Sequence[str | os.PathLike[str]] | str | os.PathLike[str],
        output_folder: str | os.PathLike[str] = "data",
        options: PairOptions | None = None,
    ) -> tuple[list[dict[str, Any]], PairReport]:
        """Questions and answers on documents, rated, without repetitions, written to ``OUTPUT/pairs/train.jsonl``.

        An interrupted call is taken up again with the same arguments.

        Args:
            sources: One or several documents, files or addresses of web pages.
            output_folder: Where progress and result are kept.
            options: How pairs are made.

        Returns:
            Rows with ``messages``, and what was counted.

        Raises:
            DataError: A document that cannot be read, or no pair is left.
        """
        paths = [sources] if isinstance(sources, str | os.PathLike) else list(sources)
        pieces = [piece for path in paths for piece in self.chunk_data(path)]
        folder = Path(output_folder)
        rows, report = synthetic.make_pairs(pieces, self._generate, folder / "progress.jsonl", options)
        _write(folder, "pairs", rows)
        return rows, report

    def make_variations(
        self, rows: Sequence[Mapping[str, Any]], count: int, output_folder: str | os.PathLike[str] | None = None
    ) -> list[dict[str, Any]]:
        """New rows after the user's own; see :func:`unsloth.data.synthetic.make_variations`.

        With an ``output_folder`` they are written to ``OUTPUT/variations/train.jsonl``, and an interrupted call is
        taken up again with the same arguments. So it is with the two ways below.
        """
        made = synthetic.make_variations(rows, self._generate, count, progress=_progress(output_folder, "variations"))
        _write(output_folder, "variations", made)
        return made

    def invent(
        self, task: str, columns: Sequence[str], count: int, output_folder: str | os.PathLike[str] | None = None
    ) -> list[dict[str, Any]]:
        """Rows for a task, without any examples; see :func:`unsloth.data.synthetic.invent`."""
        made = synthetic.invent(task, columns, self._generate, count, progress=_progress(output_folder, "invented"))
        _write(output_folder, "invented", made)
        return made

    def restructure(
        self, rows: Sequence[Mapping[str, Any]], output_folder: str | os.PathLike[str] | None = None
    ) -> tuple[list[dict[str, Any]], list[int]]:
        """Rows of any shape as conversations; see :func:`unsloth.data.synthetic.restructure`."""
        made, failed = synthetic.restructure(rows, self._generate, progress=_progress(output_folder, "restructured"))
        _write(output_folder, "restructured", made)
        return made, failed


def _progress(folder: str | os.PathLike[str] | None, name: str) -> Path | None:
    return None if folder is None else Path(folder) / f"{name}.progress.jsonl"


def _write(folder: str | os.PathLike[str] | None, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    if folder is None:
        return
    with artifact.stage(Path(folder) / name, kind="training data", details={"rows": len(rows)}) as staging:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (staging / "train.jsonl").write_text(lines, encoding="utf-8")


def _local(model: Any, tokenizer: Any, max_new_tokens: int) -> Generate:
    def generate(prompts: list[str]) -> list[str]:
        replies = []
        for prompt in prompts:
            inputs = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}],
                add_generation_prompt=True,
                return_tensors="pt",
                return_dict=True,
            ).to(model.device)
            ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
            replies.append(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
        return replies

    return generate


def _remote(url: str, model: str, api_key: str | None, max_tokens: int, timeout: float) -> Generate:
    address = url.rstrip("/") + "/chat/completions"
    if not address.startswith(("http://", "https://")):
        raise DataError("the address of a server begins with http:// or https://", got=url)
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {api_key}"} if api_key else {})}

    def reply(prompt: str) -> str:
        body = {"model": model, "messages": [{"role": "user", "content": prompt}], "max_tokens": max_tokens}
        request = urllib.request.Request(address, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                return json.load(answer)["choices"][0]["message"]["content"] or ""
        except (OSError, KeyError, IndexError, TypeError, ValueError) as error:
            raise NetworkError(
                f"the server gave no reply ({type(error).__name__}: {error})",
                got=address,
                do="Check address, model name and key; finished pieces are kept, so call again.",
            ) from error

    return lambda prompts: [reply(prompt) for prompt in prompts]
