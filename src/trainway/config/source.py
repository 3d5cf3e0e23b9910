"""Reads a configuration file or a shipped preset into a list of settings, each with the line it stands on."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, get_origin

import yaml

from trainway.config.schema import RunConfig
from trainway.errors import ConfigError

MAX_FILE_BYTES = 1 << 20
MAX_NODES = 20_000
"""A configuration has a few hundred values; more than this, aliases counted as often as used, is a bomb."""
MAX_DEPTH = 32
FILE_SUFFIXES = (".yaml", ".yml", ".toml")
TABLES = frozenset(
    leaf
    for section in RunConfig.model_fields.values()
    for leaf, field in getattr(section.annotation, "model_fields", {}).items()
    if get_origin(field.annotation) is dict
)
"""Settings that are tables themselves: their keys are the user's own, and may have dots."""


@dataclass(frozen=True)
class Setting:
    """One value as its author wrote it."""

    path: tuple[str, ...]
    value: Any
    origin: str


@dataclass(frozen=True)
class Layer:
    """All settings of one source; a later layer wins over an earlier one."""

    name: str
    settings: list[Setting] = field(default_factory=list)
    explicit: bool = True
    """False for presets and files reached by `extends`: the user did not write these for this run."""


def preset_names() -> list[str]:
    """Names of the shipped presets, sorted."""
    directory = resources.files("trainway.config") / "presets"
    return sorted(
        entry.name.removesuffix(".yaml") for entry in directory.iterdir() if entry.name.endswith(".yaml")
    )


def preset_text(name: str) -> str:
    """The YAML text of a shipped preset; dashes count as underscores. Raises ConfigError for an unknown name."""
    known = preset_names()
    plain = name.replace("-", "_")
    if plain not in known:
        nearest = difflib.get_close_matches(plain, known, n=1)
        fix = (
            f"did you mean {nearest[0]!r}?"
            if nearest
            else "choose one of these, or give a .yaml or .toml file"
        )
        raise ConfigError(f"there is no preset {name!r}", f"the presets are {', '.join(known)}", fix)
    return (resources.files("trainway.config") / "presets" / f"{plain}.yaml").read_text(encoding="utf-8")


def preset_descriptions() -> dict[str, str]:
    """One sentence for every shipped preset, by name."""
    return {
        name: next((s.value for s in parse_yaml(preset_text(name), name) if s.path == ("description",)), "")
        for name in preset_names()
    }


def read_layers(source: str | Path | Mapping[str, Any]) -> list[Layer]:
    """The layers of `source`, lowest first: what it extends, then the source itself.

    Raises ConfigError for a missing, huge or malformed file, and for `extends` that runs in a circle.
    """
    layers: list[Layer] = []
    seen: list[str] = []
    base = Path()
    explicit = True
    current: str | Path | Mapping[str, Any] | None = source
    while current is not None:
        layer, identity, parent_base = _read_one(current, base, explicit)
        if identity in seen:
            chain = " -> ".join([*seen, identity])
            raise ConfigError(f"`extends` runs in a circle at {layer.name}", chain, "take one `extends` out")
        if identity:
            seen.append(identity)
        extends = [setting for setting in layer.settings if setting.path == ("extends",)]
        layers.insert(0, Layer(layer.name, [s for s in layer.settings if s not in extends], layer.explicit))
        base, explicit, current = parent_base, False, None
        if extends:
            current = extends[-1].value
            if not isinstance(current, str) or not current:
                raise ConfigError(
                    f"{extends[-1].origin}: `extends` is {current!r}",
                    "it takes one preset name or one file",
                    "write e.g. `extends: m3_medium`",
                )
    return layers


def parse_yaml(text: str, name: str) -> list[Setting]:
    """Settings of a YAML document with `name:line` as their origin.

    Raises ConfigError for malformed YAML, duplicate keys, NaN and infinity, and for deep or exploding documents.
    """
    try:
        root = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}" if mark else name
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "malformed"
        raise ConfigError(f"{where}: this is not valid YAML", str(problem), "correct that line") from None
    except RecursionError:
        raise _too_deep(name) from None
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(
            f"{name} holds no settings",
            "its top level is not `key: value` lines",
            "see `trainway presets show m3_medium`",
        )
    return _YamlWalk(name).settings(root)


def parse_scalar(text: str) -> Any:
    """The value that `text` has as a YAML scalar or list: `3`, `1e-3`, `true`, `null`, `[a, b]`, else the text.

    Raises ConfigError for NaN, infinity and deep nesting.
    """
    try:
        root = yaml.compose(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError):
        # a path with a colon or a prompt with a quote is text, not broken YAML
        return text
    return None if root is None else _YamlWalk("command line", lines=False).value(root, 0)


def flatten(settings: Mapping[str, Any], origin: str) -> list[Setting]:
    """Settings of a nested mapping (TOML, Python), all with one origin. Raises ConfigError for NaN and depth."""
    found: list[Setting] = []

    def walk(node: Mapping[str, Any], prefix: tuple[str, ...]) -> None:
        if len(prefix) > MAX_DEPTH:
            raise _too_deep(origin)
        for key, value in node.items():
            path = (*prefix, *str(key).split("."))
            if isinstance(value, Mapping) and value and not _is_table(path):
                walk(value, path)
            else:
                found.append(Setting(path, _finite(value, origin), origin))

    walk(settings, ())
    return found


def _read_one(source: str | Path | Mapping[str, Any], base: Path, explicit: bool) -> tuple[Layer, str, Path]:
    """One layer, what identifies it in a circle, and the directory that its own `extends` is relative to."""
    if isinstance(source, Mapping):
        return Layer("settings", flatten(source, "settings"), explicit), "", base
    text = str(source)
    if isinstance(source, Path) or text.endswith(FILE_SUFFIXES) or "/" in text:
        path = base / Path(text).expanduser()
        return Layer(str(path), read_file(path), explicit), str(path.resolve()), path.parent
    name = text.replace("-", "_")
    settings = parse_yaml(preset_text(name), f"preset {name}")
    # a preset has no lines of the user's: its name says enough
    named = [Setting(s.path, s.value, f"preset {name}") for s in settings]
    return Layer(f"preset {name}", named, explicit=False), f"preset {name}", base


def read_file(path: Path) -> list[Setting]:
    """Settings of a YAML or TOML file, each with its line. Raises ConfigError for one that cannot be read."""
    try:
        if not path.is_file():
            why = "it is a directory" if path.is_dir() else "there is no such file"
            raise ConfigError(
                f"cannot read the configuration {path}",
                why,
                f"give a file, or a preset: {', '.join(preset_names())}",
            )
        if path.suffix not in FILE_SUFFIXES:
            raise ConfigError(
                f"cannot read the configuration {path}",
                "its name ends in none of .yaml .yml .toml",
                "rename it",
            )
        with open(path, "rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
        if len(raw) > MAX_FILE_BYTES:
            raise ConfigError(
                f"{path} is larger than 1 MiB", "a configuration is a few KiB", "give the right file"
            )
        text = raw.decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(
            f"cannot read the configuration {path}", error.strerror or str(error), "check the path"
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not UTF-8 text", f"byte {error.start} is not valid", "save it as UTF-8"
        ) from None
    return _parse_toml(text, str(path)) if path.suffix == ".toml" else parse_yaml(text, str(path))


def _parse_toml(text: str, name: str) -> list[Setting]:
    import tomllib

    try:
        return flatten(tomllib.loads(text), name)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{name}: this is not valid TOML", str(error), "correct that line") from None
    except RecursionError:
        raise _too_deep(name) from None


class _Loader(yaml.SafeLoader):
    """The safe loader, with numbers as people write them (1e-3) and without dates and base-60 integers."""


def _resolvers() -> dict[Any, Any]:
    skip = {"tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:float", "tag:yaml.org,2002:int"}
    kept = {
        first: [(tag, pattern) for tag, pattern in entries if tag not in skip]
        for first, entries in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    integer = re.compile(r"^[-+]?[0-9][0-9_]*$")
    real = re.compile(
        r"^(?:[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    )
    for first in "-+0123456789":
        kept.setdefault(first, []).append(("tag:yaml.org,2002:int", integer))
    for first in "-+0123456789.":
        kept.setdefault(first, []).append(("tag:yaml.org,2002:float", real))
    return kept


_Loader.yaml_implicit_resolvers = _resolvers()


class _YamlWalk:
    """Turns a composed document into settings, counting nodes: an alias costs what it expands to."""

    def __init__(self, name: str, *, lines: bool = True) -> None:
        self.name = name
        self.lines = lines
        self.nodes = 0

    def settings(self, root: yaml.MappingNode) -> list[Setting]:
        found: list[Setting] = []
        self._mapping(root, (), found)
        return found

    def value(self, node: yaml.Node, depth: int) -> Any:
        self._count(depth, node)
        if isinstance(node, yaml.SequenceNode):
            self._plain_tag(node, "seq")
            return [self.value(item, depth + 1) for item in node.value]
        if isinstance(node, yaml.MappingNode):
            items = self._items(node)
            return {key: self.value(item, depth + 1) for key, _, item in items}
        return _finite(self._scalar(node), self._where(node))

    def _mapping(self, node: yaml.MappingNode, prefix: tuple[str, ...], found: list[Setting]) -> None:
        self._count(len(prefix), node)
        for key, key_node, item in self._items(node):
            path = (*prefix, *key.split("."))
            if isinstance(item, yaml.MappingNode) and item.value and not _is_table(path):
                self._mapping(item, path, found)
            else:
                found.append(Setting(path, self.value(item, len(path)), self._where(key_node)))

    def _items(self, node: yaml.MappingNode) -> list[tuple[str, yaml.Node, yaml.Node]]:
        self._plain_tag(node, "map")
        items: list[tuple[str, yaml.Node, yaml.Node]] = []
        lines: dict[str, int] = {}
        for key_node, item in node.value:
            where = self._where(key_node)
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConfigError(
                    f"{where}: a key is not a word", "keys are names of settings", "correct that line"
                )
            key = str(key_node.value)
            if key == "<<":
                raise ConfigError(
                    f"{where}: merge keys (<<) are not supported", "", "use `extends: FILE` instead"
                )
            if key in lines:
                raise ConfigError(
                    f"{where}: {key!r} is set twice",
                    f"it is set on line {lines[key]} already",
                    "keep one of the two",
                )
            lines[key] = key_node.start_mark.line + 1
            items.append((key, key_node, item))
        return items

    def _scalar(self, node: yaml.Node) -> Any:
        try:
            match node.tag.removeprefix("tag:yaml.org,2002:"):
                case "null":
                    return None
                case "bool":
                    return node.value.lower() in ("true", "yes", "on")
                case "int":
                    return int(node.value.replace("_", ""))
                case "float":
                    return float(
                        node.value.replace("_", "").lower().replace(".inf", "inf").replace(".nan", "nan")
                    )
                case "str":
                    return node.value
        except ValueError as error:
            raise ConfigError(
                f"{self._where(node)}: {node.value[:40]!r}… is no number", str(error), "correct it"
            ) from None
        raise self._tag_error(node)

    def _plain_tag(self, node: yaml.Node, kind: str) -> None:
        if node.tag != f"tag:yaml.org,2002:{kind}":
            raise self._tag_error(node)

    def _tag_error(self, node: yaml.Node) -> ConfigError:
        return ConfigError(
            f"{self._where(node)}: the tag {node.tag} is not allowed",
            "only plain values are read",
            "take it out",
        )

    def _count(self, depth: int, node: yaml.Node) -> None:
        self.nodes += 1
        if depth > MAX_DEPTH:
            raise _too_deep(self._where(node))
        if self.nodes > MAX_NODES:
            raise ConfigError(
                f"{self._where(node)}: more than {MAX_NODES} values",
                "aliases count as often as they are used",
                "shorten it",
            )

    def _where(self, node: yaml.Node) -> str:
        return f"{self.name}:{node.start_mark.line + 1}" if self.lines else self.name


def _is_table(path: tuple[str, ...]) -> bool:
    return path[-1].replace("-", "_") in TABLES


def _finite(value: Any, origin: str) -> Any:
    items = value.values() if isinstance(value, Mapping) else value
    for item in items if isinstance(value, list | tuple | Mapping) else (value,):
        if isinstance(item, float) and not math.isfinite(item):
            raise ConfigError(
                f"{origin}: {item} is not a usable number", "every setting is finite", "write a number"
            )
    return value


def _too_deep(where: str) -> ConfigError:
    return ConfigError(f"{where}: nested too deeply", "settings are at most section and key", "flatten it")
