"""Configurations: frozen dataclasses beside the classes they configure, values only in YAML.

OmegaConf's structured configs merge three layers (dataclass defaults, a YAML file, `key=value` overrides)
and know every key's type; this module adds one-line errors that name the dotted path and the nearest known
key. A configuration is data: no field selects a class, an import or an environment variable (`${...}` is
refused).
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

C = TypeVar("C")


def load_config(cls: type[C], path: str | Path | None = None, overrides: Sequence[str] = ()) -> C:
    """Merge the defaults of `cls`, the YAML file at `path` and `key=value` overrides into one frozen `cls`.

    Raises ValueError for an unknown key, a value of the wrong type or a malformed file (the dotted path is
    named), and FileNotFoundError for a missing file.
    """
    data: dict[str, Any] = {}
    if path is not None:
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"config file {path} does not exist; shipped ones: {', '.join(shipped_names()) or 'none'}"
            )
        try:
            data = _plain(OmegaConf.load(path))
        except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
            raise ValueError(f"{path}: not valid YAML: {_one_line(error)}") from error
    base = _merge(cls, data, str(path) if path else "config")
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"override {override!r} is not of the form key=value")
        try:
            change = _plain(OmegaConf.from_dotlist([f"{key.strip()}={value}"]))
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise ValueError(f"override {override!r}: {_one_line(error)}") from error
        base = _merge(cls, change, f"override {override!r}", base)
    return _build(cls, _plain(base))


def from_dict(cls: type[C], data: dict[str, Any], source: str = "config") -> C:
    """An instance of `cls` from plain data (a checkpoint's header, say), checked as strictly as a file."""
    return _build(cls, _plain(_merge(cls, data, source)))


def to_dict(config: Any) -> dict[str, Any]:
    """Plain JSON-ready data: nested dicts, lists, numbers, strings, None."""
    return _listed(dataclasses.asdict(config))


def to_yaml(config: Any) -> str:
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def differences(a: Any, b: Any, prefix: str = "") -> list[str]:
    """`dotted.key: value in a -> value in b` for each leaf in which two plain configurations differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = list(dict.fromkeys([*a, *b]))
        return [line for key in keys for line in differences(a.get(key), b.get(key), f"{prefix}{key}.")]
    return [] if a == b else [f"{prefix[:-1]}: {a!r} -> {b!r}"]


def configs_folder() -> Path:
    """The folder `configs`: beside the packages in a checkout, inside `ldm` in an installed wheel."""
    inside = Path(__file__).parent / "configs"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "configs"


def shipped_names() -> list[str]:
    folder = configs_folder()
    return sorted("configs/" + str(path.relative_to(folder)) for path in folder.rglob("*.yaml"))


def find_config(name: str | Path) -> Path:
    """The YAML file `name`: a path as given, or a shipped one (`configs/train/emoji.yaml`) from any
    folder."""
    given = Path(name)
    if given.is_file():
        return given
    parts = given.parts[1:] if given.parts[:1] == ("configs",) else given.parts
    candidate = configs_folder().joinpath(*parts)
    if ".." not in parts and candidate.is_file():
        return candidate
    close = difflib.get_close_matches(str(name), shipped_names(), n=3, cutoff=0.3)
    raise FileNotFoundError(
        f"config file {name} does not exist; shipped ones near it: {', '.join(close) or 'none'}"
    )


def _merge(cls: type, data: Any, source: str, base: Any = None) -> Any:
    if not isinstance(data, dict):
        raise ValueError(f"{source}: expected key: value pairs, got {type(data).__name__}")
    _check_keys(cls, data, source)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(cls) if base is None else base, data)
        OmegaConf.to_container(merged, throw_on_missing=False)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        raise ValueError(f"{source}: {f'{key}: ' if key else ''}{_one_line(error)}") from error
    return merged


def _check_keys(cls: type, data: dict[str, Any], source: str, prefix: str = "") -> None:
    """Unknown keys, with the nearest known one; interpolations."""
    known = typing.get_type_hints(cls)
    for key, value in data.items():
        path = f"{prefix}{key}"
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known keys: {', '.join(known)}"
            raise ValueError(f"{source}: unknown key {path}; {hint}")
        if isinstance(value, str) and "${" in value:
            raise ValueError(
                f"{source}: {path}: interpolation {value!r} is not supported; write the value itself"
            )
        inner = _dataclass_of(known[key])
        if inner is not None and isinstance(value, dict):
            _check_keys(inner, value, source, f"{path}.")
        elif inner is not None and value is not None:
            raise ValueError(f"{source}: {path} holds key: value pairs, got {value!r}")


def _build(cls: type[C], data: dict[str, Any]) -> C:
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in data.items():
        inner = _dataclass_of(hints[key])
        if value == "???":
            raise ValueError(f"{cls.__name__}.{key} has no value; set it in the YAML file or as {key}=...")
        if inner is not None and isinstance(value, dict):
            value = _build(inner, value)
        values[key] = tuple(value) if isinstance(value, list) else value
    return cls(**values)


def _dataclass_of(hint: Any) -> type | None:
    """The dataclass behind `X` or `X | None`, if any."""
    options = (
        typing.get_args(hint)
        if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
        else (hint,)
    )
    return next((option for option in options if dataclasses.is_dataclass(option)), None)  # type: ignore[return-value]


def _plain(config: Any) -> Any:
    return OmegaConf.to_container(config) if OmegaConf.is_config(config) else config


def _listed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _listed(inner) for key, inner in value.items()}
    return [_listed(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split("\n    full_key")[0].split())
