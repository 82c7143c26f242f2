"""Arguments of what every trainer of this library does to survive: skipped steps, and resuming."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from unsloth.core.errors import ConfigError
from unsloth.train import output_folder


@dataclass
class SurvivalArguments:
    """Fields to be mixed into a trainer's configuration, before the class of transformers or TRL.

    Attributes:
        resume_allow: Names of what may differ from the run that made the checkpoint one resumes from: names of
            arguments (``"learning_rate"``), ``"data"``, ``"base"``, or a state that may be missing: ``"optimizer"``,
            ``"scheduler"``, ``"rng"``.
        max_skipped_steps: End the run when this many steps in a row were not taken because their gradients were not
            finite.
        logging_nan_inf_filter: As in transformers, but off: a loss that is not a number is logged as one.
    """

    resume_allow: list[str] = field(
        default_factory=list, metadata={"help": "What may differ from the run of the checkpoint."}
    )
    max_skipped_steps: int = field(default=5, metadata={"help": "Stop after this many skipped steps in a row."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Hide losses that are not finite."})

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]
        if isinstance(self.resume_allow, str):
            self.resume_allow = [self.resume_allow]
        if isinstance(self.max_skipped_steps, bool) or not self.max_skipped_steps >= 1:
            raise ConfigError("max_skipped_steps must be at least 1", got=self.max_skipped_steps)
        output_folder.check_path(Path(self.output_dir))  # type: ignore[attr-defined]
