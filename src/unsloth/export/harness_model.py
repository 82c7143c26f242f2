"""A predictor as the lm-evaluation-harness wants its models. Imported only where the harness is installed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from transformers import PreTrainedTokenizerBase

from unsloth.core.errors import TokenizerError
from unsloth.export.predict import Predictor

_LONGEST_ANSWER = 256  # tokens, where a task does not say


class HarnessModel(TemplateLM):
    """Scores continuations of a text, and continues it.

    Args:
        predictor: The model.
        tokenizer: Its tokenizer.
    """

    def __init__(self, predictor: Predictor, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        if tokenizer.eos_token_id is None:
            raise TokenizerError("the tokenizer has no end-of-text token", do="Set tokenizer.eos_token.")
        self.tokenizer, self._predictor = tokenizer, predictor

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token that a text without context is scored after."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else begin

    @property
    def tokenizer_name(self) -> str:
        """Distinguishes cached requests of different tokenizers."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids of a text; a beginning-of-text token that it shows already is not added again."""
        begin = self.tokenizer.bos_token
        if add_special_tokens is None:
            add_special_tokens = not (begin and string.startswith(begin))
        return self.tokenizer(text=string, add_special_tokens=add_special_tokens)["input_ids"]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        sequences = [[*context, *continuation] for _, context, continuation in requests]
        results = []
        for (_, _, wanted), logits in zip(requests, self._predictor.logits(sequences), strict=True):
            ids = torch.tensor(wanted)
            log = logits[-len(wanted) - 1 : -1].log_softmax(-1)
            likelihood = log.gather(1, ids[:, None]).sum().item()
            results.append((likelihood, bool((log.argmax(-1) == ids).all())))
        return results

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts."""
        entries = [
            (None, [self.prefix_token_id], self.tok_encode(request.args[0], add_special_tokens=False))
            for request in requests
        ]
        return [likelihood for likelihood, _ in self._loglikelihood_tokens(entries)]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The most probable continuations, up to one of the task's stop texts."""
        answers = []
        for request in requests:
            context, options = request.args
            limit = int(options.get("max_gen_toks", _LONGEST_ANSWER))
            made = self._predictor.generate(self.tok_encode(context), limit)
            text = self.tokenizer.decode(made, skip_special_tokens=True)
            for stop in options.get("until") or ():
                text = text.partition(stop)[0] if stop else text
            answers.append(text)
        return answers
