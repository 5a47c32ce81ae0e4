"""Read a configuration from YAML and dotted overrides, and write the resolved one with a comment above every key."""

from __future__ import annotations

import dataclasses
import difflib
import json
import pathlib
import re
import typing
from typing import Any, Iterable, Mapping, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from moedist.config.schema import CompressConfig, Config
from moedist.errors import ConfigError

Shape = TypeVar("Shape")


@dataclasses.dataclass(frozen=True)
class FileKind:
    """What a YAML file is, for errors: its name, a file to start from, and the command that lists its keys."""

    name: str
    example: str
    help_command: str
    overridden: bool = False  # by section.key=value


CONFIGURATION = FileKind("a configuration", "configs/quickstart.yaml", "moedist train --help", overridden=True)


def load_config(path: str | pathlib.Path, overrides: Iterable[str] = ()) -> Config:
    """The configuration in a YAML file, with `section.key=value` overrides on top.

    Raises:
        ConfigError: the file is missing or not YAML, a key is unknown, or a value has the wrong type.
    """
    return load_dataclass(Config, path, overrides)


def load_dataclass(cls: type[Shape], path: str | pathlib.Path, overrides: Iterable[str] = (),
                   kind: FileKind = CONFIGURATION) -> Shape:
    """A YAML file as a dataclass with typed fields, with dotted overrides on top; see `load_config` for the errors.

    Args:
        kind: what the file is, for errors.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise ConfigError(f"no file {path}; give the path of a YAML file, such as {kind.example}")
    try:
        # OmegaConf's loader is YAML 1.1 with the float of YAML 1.2, so that 3e-4 is a number.
        tree = OmegaConf.to_container(OmegaConf.load(path))
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict) or not tree:
        raise ConfigError(f"{path} holds no keys; start from {kind.example}")
    return _from_dict(cls, tree, overrides, str(path), kind)


def config_from_dict(tree: dict[str, Any], overrides: Iterable[str] = (), origin: str = "the configuration") -> Config:
    """The configuration of a nested dict with dotted overrides on top; see `load_config` for the errors."""
    return _from_dict(Config, tree, overrides, origin)


def compress_config(value: Any, origin: str = "a compress phase") -> CompressConfig:
    """The value of a `compress` entry of the schedule; see `load_config` for the errors."""
    if not isinstance(value, dict) or not value:
        raise ConfigError(f"{origin} is {value!r}; give a method and a ratio, such as {{compress: {{method: cur, ratio: 0.5}}}}")
    return _from_dict(CompressConfig, value, (), origin)


def compress_options(method: str, ratio: float, tokens: int, more: Iterable[str]) -> CompressConfig:
    """A compression from the command line; `more` are dotted overrides, and bytes or rank_bytes take the place of `ratio`."""
    more = list(more)
    tree: dict[str, Any] = {"method": method, "tokens": tokens}
    if not any(text.startswith(("bytes=", "rank_bytes=")) for text in more):
        tree["ratio"] = ratio
    return _from_dict(CompressConfig, tree, more, "the command line")


def _from_dict(cls: type[Shape], tree: dict[str, Any], overrides: Iterable[str], origin: str,
               kind: FileKind = CONFIGURATION) -> Shape:
    overrides = list(overrides)
    for text in overrides:
        if "=" not in text:
            raise ConfigError(f"override {text!r} has no '='; write it as section.key=value, such as train.lr=3e-4")
    base = OmegaConf.structured(cls)
    try:
        return OmegaConf.to_object(OmegaConf.merge(base, OmegaConf.create(tree), OmegaConf.from_dotlist(overrides)))
    except ConfigKeyError as error:
        full, where = str(error.full_key), f"{origin} or its overrides" if kind.overridden else origin
        near = nearest_key(full, cls)
        section, _, leaf = near.rpartition(".")
        near = repr(near) if kind.overridden or not section else f"{leaf!r} of an entry of {section}"
        raise ConfigError(f"unknown key {full!r} in {where}; did you mean {near}? "
                          f"({kind.help_command} lists the keys of {kind.name})") from error
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        where = getattr(error, "full_key", None)
        what = f"value for {where!r}" if where else f"YAML in an override ({' '.join(overrides)})"
        where = f"{origin} or its overrides" if kind.overridden else origin
        raise ConfigError(f"bad {what} in {where}: {str(error).splitlines()[0]}") from error


def phases_override(phases: Iterable[Mapping[str, Any]]) -> str:
    """Phases as an override on the command line: 'phases=[{train: 300}, ...]'."""
    return "phases=" + yaml.safe_dump([dict(p) for p in phases], default_flow_style=True, sort_keys=False, width=10**6).strip()


def nearest_key(unknown: str, cls: type = Config) -> str:
    """The valid dotted key that looks most like an unknown one."""
    keys = [name for name, _ in _walk(cls)]
    unknown = re.sub(r"\[\d+\]", "", unknown)
    leaf = unknown.rsplit(".", 1)[-1]
    same_leaf = [k for k in keys if k.rsplit(".", 1)[-1] == leaf]  # right key in the wrong section
    return (same_leaf or difflib.get_close_matches(unknown, keys, n=1, cutoff=0.0))[0]


def _walk(cls: type, prefix: str = "") -> Iterable[tuple[str, dataclasses.Field]]:
    types = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        yield prefix + f.name, f
        for inner in (types[f.name], *typing.get_args(types[f.name])):  # a section, or a list of sections
            if dataclasses.is_dataclass(inner):
                yield from _walk(inner, prefix + f.name + ".")


def describe_keys() -> str:
    """All keys as text for `--help`: dotted name, default, meaning."""
    lines: list[str] = []
    plain: list[str] = []  # of no section
    defaults = Config()
    for name, f in _walk(Config):
        value: Any = defaults
        for part in name.split("."):
            value = getattr(value, part)
        if dataclasses.is_dataclass(value):
            lines.append(f"\n{name}: {f.metadata['help']}")
        else:
            (lines if "." in name else plain).append(f"  {name}={json.dumps(value)}\n      {f.metadata['help']}")
    return "\n".join([*plain, *lines])


def describe_fields(cls: type) -> str:
    """The fields of one dataclass as text for `--help`: name and meaning."""
    return "\n".join(f"  {f.name}: {f.metadata['help']}" for f in dataclasses.fields(cls))


def to_yaml(config: Config) -> str:
    """The whole configuration as YAML with a comment above every key; `load_config` reads it back equal."""
    return "".join(_yaml_lines(config, 0))


def _yaml_lines(section: Any, depth: int) -> Iterable[str]:
    pad = "  " * depth
    for f in dataclasses.fields(section):
        value = getattr(section, f.name)
        yield f"{pad}# {f.metadata['help']}\n"
        if dataclasses.is_dataclass(value):
            yield f"{pad}{f.name}:\n"
            yield from _yaml_lines(value, depth + 1)
        else:
            if isinstance(value, str):  # quoted, or a name like 1e5 would read back as a number
                text = json.dumps(value, ensure_ascii=False)
            else:
                text = yaml.safe_dump(value, default_flow_style=True, width=10_000, sort_keys=False).splitlines()[0]
            yield f"{pad}{f.name}: {text}\n"
