"""The Modelfile beside a GGUF file: the template and the stop words that the model was trained with."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from unsloth.core.errors import TokenizerError
from unsloth.core.log import get_logger
from unsloth.data import ollama

logger = get_logger(__name__)

KEPT_AS = "_ollama_modelfile"
"""The tokenizer's attribute that keeps the text."""


def modelfile(tokenizer: PreTrainedTokenizerBase, file_name: str, stops: Sequence[str] = ()) -> str:
    """A Modelfile for a GGUF file in the same folder; also kept on the tokenizer.

    A template that cannot be written in Ollama's language is left out: Ollama then takes the one in the GGUF file, as
    far as it knows it. A tokenizer without a chat template gets one that passes the prompt on.

    Args:
        tokenizer: Of the model.
        file_name: Of the GGUF file, or of its first shard.
        stops: Tokens at which generation stops, beside those that the template says.
    """
    location = f"./{file_name}"
    if not tokenizer.chat_template:
        text = _plain(location, [*([tokenizer.eos_token] if tokenizer.eos_token else []), *stops], "{{ .Prompt }}")
    else:
        try:
            text = ollama.modelfile(tokenizer, file_location=location, extra_stops=stops)
        except TokenizerError as error:
            logger.warning("the Modelfile has no TEMPLATE: %s", error)
            text = _plain(location, [*([tokenizer.eos_token] if tokenizer.eos_token else []), *stops], None)
    setattr(tokenizer, KEPT_AS, text)
    return text


def _plain(location: str, stops: Sequence[str], template: str | None) -> str:
    lines = [f"FROM {location}"]
    lines += [f'TEMPLATE """{template}"""'] if template else []
    lines += [f'PARAMETER stop "{ollama.quoted(stop)}"' for stop in dict.fromkeys(stops)]
    return "\n".join(lines) + "\n"
