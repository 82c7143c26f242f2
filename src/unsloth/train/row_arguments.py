"""Arguments of how rows become batches, beyond those that TRL has."""

from __future__ import annotations

from dataclasses import dataclass, field

from unsloth.core.errors import ConfigError
from unsloth.data.encode import PrepareOptions


@dataclass
class RowArguments:
    """Fields to be mixed into a trainer's configuration, before the class of transformers or TRL.

    Attributes:
        layout: What the rows are, where their columns mislead: ``"text"``, ``"conversation"``, ``"alpaca"``,
            ``"completion"`` or ``"tokens"``. None recognizes it.
        long_rows: What becomes of a row above ``max_length``: ``"truncate"``, ``"chunk"``, ``"drop"`` or ``"error"``,
            as in :class:`unsloth.data.encode.PrepareOptions`.
        escape_control_tokens: Tokenize names of control tokens that occur within messages as the text they are.
        tokens_per_batch: Fill each batch with documents up to this many tokens, kept apart as in packing, instead of
            with a number of rows; ``per_device_train_batch_size`` is 1 then. At least ``max_length``.
        cache_tokens: Keep the prepared data set on the disk, and find it again when rows, tokenizer and options have
            the same content (:mod:`unsloth.data.token_cache`).
    """

    layout: str | None = field(default=None, metadata={"help": "What the rows are; None recognizes it."})
    long_rows: str = field(default="truncate", metadata={"help": "truncate, chunk, drop or error."})
    escape_control_tokens: bool = field(default=False, metadata={"help": "Names of control tokens are text."})
    tokens_per_batch: int | None = field(default=None, metadata={"help": "Tokens of a batch, instead of rows."})
    cache_tokens: bool = field(default=False, metadata={"help": "Keep prepared data sets on the disk."})

    def __post_init__(self) -> None:
        PrepareOptions(None, layout=self.layout, long_rows=self.long_rows)  # type: ignore[arg-type] # says what is wrong
        if self.tokens_per_batch is not None:
            if self.tokens_per_batch < 2:
                raise ConfigError("tokens_per_batch must be at least 2", got=self.tokens_per_batch)
            given = self.per_device_train_batch_size  # type: ignore[has-type]
            if given not in (1, 8):  # 8 is the default of transformers
                raise ConfigError(
                    "a batch has either a number of rows or a number of tokens",
                    got=f"per_device_train_batch_size={given}, tokens_per_batch={self.tokens_per_batch}",
                    do="Leave one of them out.",
                )
            self.per_device_train_batch_size = 1
        super().__post_init__()  # type: ignore[misc]

    def check_tokens_per_batch(self, max_length: int | None) -> None:
        """Raise :class:`ConfigError` unless the longest row fits into a batch of ``tokens_per_batch``."""
        if self.tokens_per_batch is not None and (max_length is None or max_length > self.tokens_per_batch):
            raise ConfigError(
                f"a row of max_length={max_length} does not fit into a batch of tokens_per_batch",
                got=self.tokens_per_batch,
                do="Raise tokens_per_batch, or lower max_length.",
            )
