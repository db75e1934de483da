"""From defaults, recipe and flags to settings, each value with where it came from."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mede2.trainer.settings import FIELDS, STAGE_NAMES, Settings

_TYPES = typing.get_type_hints(Settings)


def _convert(name: str, value: Any, source: str) -> Any:
    """`value` in the type of the field `name`, or a ValueError; no lossy conversion (1.5 is no int, "yes" no float)."""
    wanted = _TYPES[name]
    options = typing.get_args(wanted) if isinstance(wanted, types.UnionType) else (wanted,)
    if value is None and type(None) in options:
        return None
    kind = next(option for option in options if option is not type(None))
    origin = typing.get_origin(kind)
    if origin is tuple:
        inner = typing.get_args(kind)
        values = [value] if isinstance(value, str) else value
        fits = isinstance(values, (list, tuple)) and (inner[-1] is Ellipsis or len(values) == len(inner))
        if fits and inner[0] is str and all(isinstance(v, str) for v in values):
            return tuple(values)
        if fits and inner[0] is float and all(_is_number(v) for v in values):
            return tuple(float(v) for v in values)
    elif origin is Mapping:
        if isinstance(value, Mapping) and all(isinstance(k, str) and _is_number(v) for k, v in value.items()):
            return {k: float(v) for k, v in value.items()}
    elif (kind is float and _is_number(value)) or (kind is int and _is_number(value) and float(value).is_integer()):
        return int(float(value)) if kind is int and isinstance(value, str) else kind(value)  # "1e3" is a whole number
    elif kind in (bool, str) and isinstance(value, kind):
        return value
    raise ValueError(f"{name}: {value!r} (from {source}) is not {_describe(kind)}")


def _is_number(value: Any) -> bool:
    """YAML 1.1 reads `1e-5` as text; such text counts as the number that it plainly is."""
    if isinstance(value, str):
        try:
            float(value)
        except ValueError:
            return False
        return True
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _describe(kind) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    if kind in names:
        return names[kind]
    if typing.get_origin(kind) is Mapping:
        return "a mapping from names to numbers"
    inner = typing.get_args(kind)
    return f"a list of {'texts' if inner[0] is str else 'numbers'}" + (
        "" if inner[-1] is Ellipsis else f" of length {len(inner)}"
    )


def _check_known(name: str, stage: int, source: str) -> None:
    if name not in FIELDS:
        close = difflib.get_close_matches(name, FIELDS, n=1)
        hint = f"; did you mean {close[0]}?" if close else f"; known: {', '.join(FIELDS)}"
        raise ValueError(f"{name}: unknown setting (from {source}){hint}")
    only = FIELDS[name].metadata["stage"]
    if only not in (None, stage):
        raise ValueError(f"{name}: has a meaning only in {STAGE_NAMES[only]} (from {source})")


def read_recipe(path: str | Path) -> dict[str, Any]:
    """A recipe: a YAML mapping from setting to value."""
    try:
        recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"recipe: cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe: {path} is not YAML: {error}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"recipe: {path} must hold `setting: value` lines, not {type(recipe).__name__}")
    return recipe


def parse_assignments(assignments: typing.Iterable[str]) -> dict[str, Any]:
    """`("weight_decay=0.1", ...)` as a mapping; the values are read as YAML."""
    values = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise ValueError(f"--set {assignment}: write key=value")
        if name in values:
            raise ValueError(f"{name}: set twice by --set")
        try:
            values[name] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"--set {assignment}: the value is not YAML") from error
    return values


@dataclass(frozen=True)
class Resolved:
    """Settings of a stage and, per field, where the value came from ("flag", "recipe FILE", "default", ...)."""

    stage: int
    settings: Settings
    origins: Mapping[str, str]

    def described(self) -> list[tuple[str, Any, str]]:
        """Rows of (field, value, origin), leaving out fields that have no meaning in this stage."""
        return [
            (name, value, self.origins[name])
            for name, value in self.settings.as_dict().items()
            if FIELDS[name].metadata["stage"] in (None, self.stage)
        ]

    def replaced(self, origin: str, **values) -> "Resolved":
        """The same with some values computed later (`model: demo` resolved to a folder), and their origin."""
        return Resolved(
            self.stage, dataclasses.replace(self.settings, **values), {**self.origins, **dict.fromkeys(values, origin)}
        )


def resolve(stage: int, layers: typing.Sequence[tuple[str, Mapping[str, Any]]]) -> Resolved:
    """Merge layers of (origin, {setting: value}), the first one weakest, over the defaults.

    Raises ValueError for an unknown setting, one without a meaning in this stage, or an impossible value.
    """
    values: dict[str, Any] = {}
    origins = dict.fromkeys(FIELDS, "default")
    for origin, layer in layers:
        for name, value in layer.items():
            _check_known(str(name), stage, origin)
            values[name] = _convert(name, value, origin)
            origins[name] = origin
    return Resolved(stage, Settings(**values), origins)
