"""The file that describes a run: YAML, with a section for each configuration class.

Nothing here imports torch, so that a mistake in the file is reported at once.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from unsloth.cli import schema
from unsloth.core.errors import ConfigError

_OWN = "cli/run_config.py"
_DATA_ENDINGS = (".jsonl", ".csv", ".tsv", ".parquet")
_SWITCHES = ("load_in_4bit", "load_in_8bit", "load_in_16bit", "full_finetuning")
_FAST_PATHS = ("fast_layers", "fused_head")


@dataclass(frozen=True)
class DataOptions:
    """The rows to train on.

    Attributes:
        path: A file (JSON, JSONL, CSV, TSV, Excel, Parquet, text), a folder of files or saved by ``datasets``, or
            a hub id.
        format: The file's format, where its name does not tell.
        split: Split of a folder or hub id.
        text_field: Column that holds text; the same as ``training.dataset_text_field``.
        rows: Use only this many rows, from the beginning.
        responses_only: Train on the assistant's turns only.
        instruction_part: The text that starts a user's turn; None reads it off the chat template.
        response_part: The text that starts an assistant's turn.
        eval_path: Held-out rows, like ``path``.
        eval_split: Held-out split of ``path`` (or of ``eval_path``).
        eval_rows: Hold out this many rows from the end of the training rows.
    """

    path: str
    format: Literal["json", "jsonl", "csv", "tsv", "xlsx", "parquet", "txt"] | None = None
    split: str = "train"
    text_field: str | None = None
    rows: int | None = None
    responses_only: bool = False
    instruction_part: str | None = None
    response_part: str | None = None
    eval_path: str | None = None
    eval_split: str | None = None
    eval_rows: int | None = None

    def __post_init__(self) -> None:
        for name in ("rows", "eval_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"data.{name} must be at least 1", got=value, do="Leave it out to use all rows.")
        if self.eval_rows is not None and (self.eval_path or self.eval_split):
            raise ConfigError(
                "data.eval_rows holds out training rows, but other held-out rows are named too",
                do="Keep either eval_rows, or eval_path and eval_split.",
            )
        if (self.instruction_part is None) != (self.response_part is None):
            raise ConfigError("data.instruction_part and data.response_part go together", do="Give both, or neither.")


@dataclass(frozen=True)
class SaveOptions:
    """What is written when the training is over, into ``training.output_dir``.

    Attributes:
        methods: ``lora`` (the adapter), ``merged_16bit`` (a standalone model), or both; None chooses the adapter,
            or the whole model after full fine-tuning.
        plot: Draw the loss into ``loss.png``.
    """

    methods: list[str] | None = None
    plot: bool = True

    def __post_init__(self) -> None:
        unknown = [method for method in self.methods or () if method not in SAVE_METHODS]
        if unknown:
            raise ConfigError(
                "save.methods lists an unknown method", got=unknown[0], do=f"Use {' or '.join(SAVE_METHODS)}."
            )


SAVE_METHODS = ("lora", "merged_16bit")
EXPORT_METHODS = (*SAVE_METHODS, "merged_4bit", "merged_4bit_forced")
"""The ways in which a result can be saved."""


@dataclass(frozen=True)
class RunConfig:
    """A run as the file describes it, every key known and of the right type.

    Attributes:
        model: Arguments of ``FastLanguageModel.from_pretrained``.
        adapter: Arguments of ``FastLanguageModel.get_peft_model``; None if the file has no such section.
        data: The rows; None if the file has no such section.
        training: Arguments of the method's configuration, such as ``SFTConfig``.
        method: How it is trained: one of ``schema.TRAINING``.
        save: What to write at the end.
        origin: The file.
    """

    model: Mapping[str, Any]
    adapter: Mapping[str, Any] | None
    data: DataOptions | None
    training: Mapping[str, Any]
    save: SaveOptions
    origin: Path
    method: str = "sft"

    @property
    def is_full_finetuning(self) -> bool:
        """Whether the model's own weights are trained."""
        return bool(self.model.get("full_finetuning"))

    @property
    def has_fast_layers(self) -> bool:
        """Whether the model's layers are swapped for faster ones."""
        return bool(self.model.get("fast_layers", True))


@dataclass(frozen=True)
class _Entry:
    """A value in the file, and where it stands."""

    value: Any
    where: str


class _Loader(yaml.SafeLoader):
    """Plain values as in YAML 1.2: 1e-4 is a number, and no, off, 1:30 and 2024-01-01 are text."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}


for _tag, _pattern, _first in (
    ("null", r"^(?:~|null|Null|NULL|)$", "~nN"),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("int", r"^[-+]?[0-9][0-9_]*$", "-+0123456789"),
    ("float", r"^[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?$", "-+.0123456789"),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), [*_first, *([""] if _tag == "null" else [])]
    )


def read(path: str, changes: Iterable[str] = ()) -> RunConfig:
    """Read a run's file, with changes such as ``"training.max_steps=5"``.

    Raises:
        ConfigError: The file is missing or is not YAML, or a key is unknown, misplaced or of the wrong type; names
            the line and the nearest key.
    """
    file = Path(path).expanduser()
    sections = _sections(file, _text(file))
    for change in changes:
        section, entry, key = _change(change)
        sections.setdefault(section, {})[key] = entry
    values = {name: _values(name, entries) for name, entries in sections.items()}
    method = _method(sections.get("training", {}), values.get("training", {}))
    if not values.get("model", {}).get("model_name"):
        raise ConfigError(
            f"{file} does not name a model",
            do="Add to it, on two lines: model: and, indented below, model_name: a folder or a hub id.",
        )
    return RunConfig(
        model=_model(values["model"]),
        adapter=values.get("adapter"),
        data=_data(values, file),
        training=values.get("training", {}),
        save=SaveOptions(**values.get("save", {})),
        origin=file,
        method=method,
    )


def parse_memory(text: str) -> int:
    """Bytes of a size such as ``"24GB"`` (10^9 bytes a GB) or ``"22.5 GiB"`` (2^30 bytes a GiB).

    Raises:
        ConfigError: It is not a positive size.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise ConfigError("--memory needs a size", got=text, do="Such as 24GB or 80GB.")
    base = 1024 if match[3] else 1000
    power = " KMGT".index(match[2].upper() or "G")  # a bare number means GB
    return int(float(match[1]) * base**power)


def sections() -> dict[str, dict[str, schema.Key]]:
    """The keys of each section, by name."""
    switch = schema.Key(frozenset({"bool", "none"}))
    model = schema.keys_of(schema.ClassSource("unsloth", "models/options.py", "LoadOptions"))
    # The precision has its documented switches; code from a repository is allowed on the command line only.
    model = {name: key for name, key in model.items() if name not in ("precision", "trust_remote_code")}
    model["dtype"] = schema.Key(frozenset({"str", "none"}))
    return {
        "model": model | dict.fromkeys(_SWITCHES, switch) | dict.fromkeys(_FAST_PATHS, schema.Key(frozenset({"bool"}))),
        "adapter": schema.keys_of(schema.ClassSource("unsloth", "models/adapters.py", "AdapterOptions")),
        "data": schema.keys_of(schema.ClassSource("unsloth", _OWN, "DataOptions")),
        "training": training_keys(*schema.TRAINING),
        "save": schema.keys_of(schema.ClassSource("unsloth", _OWN, "SaveOptions")),
    }


def training_keys(*methods: str) -> dict[str, schema.Key]:
    """The keys of the section 'training' that one of these methods has; types are those of the first that has it."""
    keys = {"method": schema.Key(frozenset({"str"}), tuple(schema.TRAINING))}
    for method in methods:
        keys = schema.keys_of(*schema.TRAINING[method]) | keys
    return keys


def _method(entries: Mapping[str, _Entry], values: dict[str, Any]) -> str:
    """Take the method out of the section 'training', whose other keys must be its own."""
    method: str = values.pop("method", "sft")
    keys = training_keys(method)
    for name, entry in entries.items():
        if name not in keys:
            homes = [other for other in schema.TRAINING if name in training_keys(other)]
            raise ConfigError(
                f"{entry.where} is not a key of method {method}",
                do=f"Leave it out; it belongs to training.method: {' or '.join(homes)}.",
            )
        schema.convert(entry.value, keys[name], entry.where)
    return method


def _text(file: Path) -> str:
    if file.is_dir():
        raise ConfigError("the configuration must be a file, but this is a folder", got=file)
    if file.suffix.lower() in _DATA_ENDINGS:
        raise ConfigError(
            "this is a file of data, not a configuration in YAML",
            got=file,
            do="Name it in a YAML file, as path: in the section 'data'; examples/train.yaml is one to start from.",
        )
    if not file.exists():
        nearby = sorted(str(p) for ending in ("yaml", "yml") for p in file.parent.glob(f"*.{ending}"))
        near = difflib.get_close_matches(str(file), nearby, 1, 0.5)
        do = f"Did you mean {near[0]}?" if near else "Check the path, or start from examples/train.yaml."
        raise ConfigError("no such configuration file", got=file, do=do)
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"{file} cannot be read: {reason}", do="Name a text file in YAML.") from error


def _sections(file: Path, text: str) -> dict[str, dict[str, _Entry]]:
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            raise ConfigError(f"{file} is empty", do="Start from examples/train.yaml.")
        found = {}
        for name, node, line in _items(root, f"{file}"):
            where = f"{file}, line {line}"
            _known(name, sections(), f"{where}: unknown section")
            if isinstance(node, yaml.ScalarNode) and loader.construct_object(node) is None:
                continue  # a heading with nothing below it
            found[name] = {
                key: _Entry(loader.construct_object(value, deep=True), f"{file}, line {at}: {name}.{key}")
                for key, value, at in _items(node, f"{where}: {name}")
            }
        for name, entries in found.items():
            for key, entry in entries.items():
                _check_key(name, key, entry.where.removesuffix(f"{name}.{key}"))
        return found
    except yaml.MarkedYAMLError as error:
        raise _bad_yaml(file, text, error) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} is not YAML: {error}".splitlines()[0]) from error
    finally:
        loader.dispose()


def _items(node: yaml.Node, where: str) -> Iterable[tuple[str, yaml.Node, int]]:
    """Keys, values and lines (counted from 1) of a mapping; a key may stand there once."""
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(
            f"{where} must hold 'key: value' lines",
            got=node.value if isinstance(node, yaml.ScalarNode) else "a list",
            do="Put a space after each colon, and indent the keys of a section by two spaces.",
        )
    items: dict[str, tuple[str, yaml.Node, int]] = {}
    for key, value in node.value:
        name, line = str(key.value), key.start_mark.line + 1
        if name in items:
            raise ConfigError(f"{where}: '{name}' stands in line {items[name][2]} and again in line {line}")
        items[name] = (name, value, line)
    return items.values()


def _bad_yaml(file: Path, text: str, error: yaml.MarkedYAMLError) -> ConfigError:
    mark = error.problem_mark or error.context_mark
    line = mark.line if mark else 0
    content = text.splitlines()[line].strip() if line < len(text.splitlines()) else "the end of the file"
    do = "Check the indentation, the space after each colon, and that quotes and brackets are closed."
    if "\t" in text:
        do = "Indent with spaces: YAML does not accept tabs."
    if "for the tag" in str(error.problem):
        do = "Words that begin with ! are not accepted here; write a plain value."
    return ConfigError(f"{file}, line {line + 1} is not YAML ({error.problem})", got=content, do=do)


def _change(change: str) -> tuple[str, _Entry, str]:
    """Section, value and key of ``"section.key=value"``."""
    path, equals, text = change.partition("=")
    section, dot, key = path.strip().partition(".")
    if not equals:
        raise ConfigError("--set needs section.key=value", got=change, do="Such as --set training.max_steps=20")
    if not dot:
        homes = _sections_of_key(section)
        do = f"Write {homes[0]}.{section}=..." if homes else "Such as --set training.max_steps=20"
        raise ConfigError("--set needs section.key=value", got=change, do=do)
    _known(section, sections(), "--set: unknown section")
    _check_key(section, key, "--set: ")
    try:
        value = yaml.load(text, _Loader)  # noqa: S506 (a safe loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {path}: the value is not YAML", got=text, do="Put it in quotes.") from error
    return section, _Entry(value, f"--set {path.strip()}"), key


def _sections_of_key(key: str) -> list[str]:
    return [name for name, keys in sections().items() if key in keys]


def _check_key(section: str, key: str, where: str) -> None:
    if section == "model" and key == "trust_remote_code":
        raise ConfigError(
            f"{where}trust_remote_code cannot be set in a file, because it lets a repository run its own code",
            do="If you trust the repository, pass --trust-remote-code on the command line.",
        )
    _known(key, sections()[section], f"{where}unknown key in section '{section}'")


def _known(name: str, names: Mapping[str, Any], problem: str) -> None:
    """Raise :class:`ConfigError` with the nearest name unless ``name`` is one of ``names``."""
    if name in names:
        return
    homes = _sections_of_key(name)
    if homes:
        raise ConfigError(problem, got=name, do=f"It belongs under '{homes[0]}:'.")
    near = difflib.get_close_matches(name.replace("-", "_"), names, 1, 0.6)
    listed = f"Known are: {', '.join(list(names)[:8])}{' and others' if len(names) > 8 else ''}."
    raise ConfigError(problem, got=name, do=f"Did you mean {near[0]}?" if near else listed)


def _values(section: str, entries: Mapping[str, _Entry]) -> dict[str, Any]:
    keys = sections()[section]
    return {name: schema.convert(entry.value, keys[name], entry.where) for name, entry in entries.items()}


def _model(values: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``from_pretrained``: what stands under ``more`` is passed on like the rest."""
    chosen = [name for name in _SWITCHES if values.get(name)]
    if len(chosen) > 1:
        raise ConfigError("only one precision can be chosen", got=", ".join(chosen), do="Keep one of them.")
    return {**{name: value for name, value in values.items() if name != "more"}, **(values.get("more") or {})}


def _data(values: dict[str, dict[str, Any]], file: Path) -> DataOptions | None:
    section = values.get("data")
    if section is None:
        return None
    if not section.get("path"):
        raise ConfigError(f"the section 'data' of {file} has no path", do="Add path: with a file, folder or hub id.")
    data = DataOptions(**section)
    field = values.get("training", {}).get("dataset_text_field")
    if data.text_field and field and field != data.text_field:
        raise ConfigError(
            "data.text_field and training.dataset_text_field contradict each other",
            got=f"{data.text_field} and {field}",
            do="Give one of them.",
        )
    return replace(data, text_field=data.text_field or field)
