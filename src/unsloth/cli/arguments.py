"""Arguments and options that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

ConfigFile = Annotated[str, typer.Argument(metavar="CONFIG.yaml", help="The file that describes the run.")]
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Replace a value of the file; may be repeated."),
]
ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="A folder, an adapter's folder, or a hub id.")]
RemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Let the model's repository run code of its own.")
]
Precision = Annotated[
    str | None, typer.Option(help="How to hold the base weights: 4bit, 8bit or 16bit.", show_default=False)
]
