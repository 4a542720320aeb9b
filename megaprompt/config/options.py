"""What the options of several commands have in common: kinds of values, defaults, and YAML files of options."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from cyclopts import App, CycloptsError, Parameter, Token
from cyclopts.config import Dict

from megaprompt.errors import UsageError

ROW_TOKENS = 256
"""Width of packed rows, unless told otherwise."""
PASS_TOKENS = 1024
"""Tokens that the backbone computes at once on each rank, unless told otherwise."""

Dtype = Literal["float32", "bfloat16", "float16", "float64"]
Encoder = Literal["lstm", "mlp", "none"]


def _split_names(_: type, tokens: Sequence[Token]) -> tuple[str, ...]:
    if (
        tokens[0].source == "cli"
    ):  # of an option that is given again, the last one counts; YAML has a token for each name
        tokens = tokens[-1:]
    return tuple(name.strip() for token in tokens for name in token.value.split(",") if name.strip())


def _whole_number(_: type, tokens: Sequence[Token]) -> int:
    try:
        return int(tokens[-1].value)  # cyclopts itself makes 4 of 4.5
    except ValueError:
        raise ValueError(f"{tokens[-1].value} is not a whole number") from None


def _number(_: type, tokens: Sequence[Token]) -> float:
    try:
        number = float(tokens[-1].value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{tokens[-1].value} is not a number")
    return number


Names = Annotated[
    tuple[str, ...],
    Parameter(converter=_split_names, n_tokens=1, metavar="A,B,..", show_default=lambda names: ",".join(names)),
]
"""Several names, separated by commas on the command line, or a list in YAML."""
OptionalNames = Annotated[Names, Parameter(show_default=False)]
Whole = Annotated[int, Parameter(converter=_whole_number)]
WholeOrNone = Annotated[int | None, Parameter(converter=_whole_number)]
Number = Annotated[float, Parameter(converter=_number)]
NumberOrNone = Annotated[float | None, Parameter(converter=_number)]
Flag = Annotated[bool, Parameter(show_default=False)]

READING: dict[str, Any] = {
    "default_parameter": Parameter(negative=(), allow_repeating=True),  # no --no-resume; the last --out counts
    "result_action": "return_value",
    "exit_on_error": False,
    "print_error": False,
    "suppress_keyboard_interrupt": False,
}
"""How cyclopts reads options: mistakes are exceptions, and what a command returns is returned."""


def above_zero(config: Any, *names: str) -> None:
    """Check that numbers that are given are above 0.

    Raises:
        UsageError: one is not.
    """
    for name in names:
        if (value := getattr(config, name)) is not None and value <= 0:
            raise UsageError(f"--{name.replace('_', '-')} {value}: give a number above 0")


C = TypeVar("C")


def to_yaml(config: Any) -> str:
    """A configuration as YAML text; `from_yaml` reads it back."""
    values = dataclasses.asdict(config)
    plain = {k: str(v) if isinstance(v, Path) else list(v) if isinstance(v, tuple) else v for k, v in values.items()}
    return yaml.safe_dump(plain, sort_keys=False)


def read_yaml(path: Path) -> Dict:
    """The options in a YAML file, as a source of values for cyclopts.

    Raises:
        UsageError: the file cannot be read, or does not hold options.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{path}: cannot be read as YAML ({' '.join(str(error).split())})") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path}: expected `option: value` lines")
    given = {str(name): value for name, value in values.items() if value is not None}
    return Dict(given, source="this file")


def from_yaml(config: type[C], path: Path) -> C:
    """Read a configuration from a YAML file, checked like options of the command line.

    Raises:
        UsageError: the file cannot be read, or has unknown keys or wrong values.
    """
    reader = App(config=read_yaml(path), **READING)
    reader.default(config)
    try:
        return reader([])
    except (CycloptsError, UsageError) as error:
        raise UsageError(f"{path}: {error}") from error
