"""What has to be measured of a model before its tensors are quantized; at most once for all files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from unsloth.core.errors import ConfigError
from unsloth.core.log import get_logger
from unsloth.export import calibration, dynamic, imatrix, sensitivity, verify
from unsloth.export.calibration import Source
from unsloth.export.gguf import methods, quantize
from unsloth.export.gguf.convert import Conversion
from unsloth.export.gguf.file import Planned, Reader
from unsloth.export.gguf.methods import Method
from unsloth.export.sensitivity import Terms

logger = get_logger(__name__)


class Importance:
    """The importance matrix and the sensitivities that the files of a model need, and no more.

    Args:
        conversion: Of the model.
        tokenizer: Of the model.
        wanted: The methods of all files.
        file: An importance matrix that was made before, for all files.
        data: What to measure on, for all files; None measures where a method needs it, on what the model was trained
            on in this process, or else on what ships.
        tokens: The most tokens to measure on.

    Raises:
        ConfigError: A file and data for methods that would use one of them alone.
        DataError: Data that cannot be used.
        ExportError: The file cannot be read or is of another model, or nothing could be measured.
    """

    def __init__(
        self,
        conversion: Conversion,
        tokenizer: PreTrainedTokenizerBase,
        wanted: Sequence[Method],
        *,
        file: str | os.PathLike[str] | None = None,
        data: Source | None = None,
        tokens: int = 16_384,
    ) -> None:
        self._conversion = conversion
        self._for_all = file is not None or data is not None
        self.source: str | None = None
        self._values: quantize.Imatrix | None = None
        self._terms: Terms = {}
        if file is not None:
            self._read(Path(file).expanduser())
        measured = any(method.measured for method in wanted)
        if file is not None and data is not None and not measured:
            raise ConfigError(
                "imatrix_file and calibration_data both say what matters in the model", do="Pass one of them."
            )
        needed = file is None and (data is not None or any(is_wanted(method, conversion) for method in wanted))
        if measured or needed:
            text = calibration.of_model(conversion.model, data, tokenizer, tokens=tokens)
            self._measure(text, backwards=measured)

    def _read(self, path: Path) -> None:
        found = quantize.read_imatrix(path)
        quantize.check_imatrix(found, {t.name: (t.shape, t.type) for t in self._conversion.planned}, path)
        self._values, self.source = found, path.name

    def _measure(self, text: calibration.Text, *, backwards: bool) -> None:
        logger.info("measuring the importance of the model's inputs on %d tokens of %s", text.tokens, text.source)
        with verify.as_merged(self._conversion.model, self._conversion.options):
            if backwards:
                matrix, self._terms = sensitivity.measure(self._conversion.model, self._conversion, text)
            else:
                matrix = imatrix.measure(self._conversion.model, self._conversion, text)
        if self._values is None:
            self._values, self.source = matrix.means(), text.source

    def job(self, method: Method) -> quantize.Job:
        """What is done for a method; the types of a measured one are chosen later, by :meth:`chosen`."""
        used = self._for_all or is_wanted(method, self._conversion)
        return quantize.Job(method, self._values if used else None)

    def budget(self, method: Method) -> list[Planned]:
        """The tensors of a measured method's file, with the types of the plain one."""
        plain = dynamic.budget_of(method, self._conversion)
        return [plain.get(tensor.name, tensor) for tensor in self._conversion.planned]

    def chosen(self, job: quantize.Job, source: Reader) -> quantize.Job:
        """The job of a measured method with its types, chosen on the values in the unquantized file."""
        assert job.imatrix is not None
        found = dynamic.choose(job.method, self._conversion, source, self._terms, job.imatrix)
        logger.info(
            "%s: %d of %d bytes; expected divergence %.2g nats a token, %.2g with the plain types",
            job.method.name,
            found.size,
            found.budget,
            found.divergence,
            found.plain_divergence,
        )
        return replace(job, types={**found.types, **(job.types or {})})


def is_wanted(method: Method, conversion: Conversion) -> bool:
    """Whether a method gets an importance matrix even if none is asked for."""
    if method.measured:
        return True
    sizes = {tensor.name: tensor.shape for tensor in conversion.planned}
    kinds = methods.types(method, sizes, replace(conversion.shape, imatrix=True))
    fitted = {name: methods.fitted(kind, sizes[name][-1]) for name, kind in kinds.items()}
    inner = {name: kind for name, kind in fitted.items() if name not in methods.WITHOUT_IMATRIX}
    return any(
        kind in methods.WANT_IMATRIX or methods.needs_imatrix(method, name, kind) for name, kind in inner.items()
    )
