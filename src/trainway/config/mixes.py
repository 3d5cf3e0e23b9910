"""The training sources of a configuration, all in one form, and whether they are a weighted mix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from trainway.config.schema import DataConfig, SourceConfig
from trainway.errors import ConfigError


def train_sources(data: DataConfig) -> tuple[SourceConfig, ...]:
    """The entries of data.train: a bare string is a source of that path."""
    return tuple(SourceConfig(path=entry) if isinstance(entry, str) else entry for entry in data.train)


def source_name(source: SourceConfig) -> str:
    """What logs, reports and errors call a source."""
    return source.name or source.path


def is_mix(data: DataConfig) -> bool:
    """Whether weights or epochs decide how often the rows of each source come."""
    return any(source.weight is not None or source.epochs is not None for source in train_sources(data))


def plain_source(entry: str | Mapping[str, Any]) -> str | dict[str, Any]:
    """A dumped entry of data.train without the fields that were left empty."""
    if isinstance(entry, str):
        return entry
    return {key: value for key, value in entry.items() if value is not None and value is not False}


def check_fields(value: Any, key: str, origin: str) -> None:
    """Raise ConfigError for a field that a source does not have, or a switch where a number belongs.

    value: what was written for data.train, not validated yet. pydantic's own words for a wrong entry of a union
    name neither the nearest field nor the place.
    """
    known = SourceConfig.model_fields
    for place, entry in enumerate(value if isinstance(value, list | tuple) else ()):
        for name, item in entry.items() if isinstance(entry, Mapping) else ():
            written = f"{key}[{place}].{name}"
            if name not in known:
                nearest = difflib.get_close_matches(str(name), known, n=1)
                fix = f"did you mean {key}[{place}].{nearest[0]}?" if nearest else "take it out"
                raise ConfigError(
                    f"{origin}: there is no setting {written!r}", f"a source has {', '.join(known)}", fix
                )
            if isinstance(item, bool) and name != "optional":
                word = "true" if item else "false"
                raise ConfigError(
                    f"{origin}: {written} is {word}", "it is not a switch", "write a value of its kind"
                )


def entry_errors(
    value: Any, origin: str, found: Iterable[tuple[Sequence[str | int], str]]
) -> list[ConfigError]:
    """What pydantic says about data.train, in our words.

    value: what was written. found: (place below data.train, such as `1 / SourceConfig / weight`; message) of each
    problem: for an entry there is one for a bare string too, which is left out.
    """
    errors: dict[str, ConfigError] = {}
    for place, message in found:
        entry = value[int(place[0])] if place and isinstance(value, list | tuple) else value
        where, kind = (f"data.train[{place[0]}]" if place else "data.train"), place[1:2]
        if len(place) > 2 and isinstance(entry, Mapping):
            field = str(place[2])
            if field not in entry:
                what, why = f"{where} has no {field}", "it is the file, directory or pattern of the source"
            else:
                what, why = f"{where}.{field} is {entry[field]!r}", f"it must be {message}"
            fix = SourceConfig.model_fields[field].description or ""
        elif list(kind) == ["str"] or (kind and isinstance(entry, Mapping)):
            continue
        else:
            what, why = f"{where} is {entry!r}", "a source is a path, or a table that has one"
            fix = "write e.g. data.train: [a.jsonl, b.jsonl] or data.train: [{path: FILE, weight: 2}]"
        errors.setdefault(what, ConfigError(f"{origin}: {what}", why, fix))
    return list(errors.values())


def mix_problems(data: DataConfig, origin: str) -> list[ConfigError]:
    """What the entries of data.train contradict each other in. origin: where data.train was set."""
    sources = train_sources(data)
    where = f"{origin}: data.train"
    problems: list[ConfigError] = []
    for place, source in enumerate(sources):
        if source.weight is not None and source.epochs is not None:
            problems.append(_weight_and_epochs(f"{where}[{place}] has both weight and epochs"))
    weighted = [source.weight is not None for source in sources]
    if any(weighted) and not all(weighted):
        place = weighted.index(False)
        if any(source.epochs is not None for source in sources):
            what = f"{where}: some sources have a weight and others epochs"
            problems = problems or [_weight_and_epochs(what)]
        else:
            problems.append(
                ConfigError(
                    f"{where}[{place}] ({source_name(sources[place])}) has no weight, but others have one",
                    "weights are shares of the training rows, so each source needs one",
                    f"give it one: {{path: {sources[place].path}, weight: 1}}, or take the others out",
                )
            )
    names = [source_name(source) for source in sources]
    for place, source in enumerate(sources):
        first = names.index(names[place])
        # two bare strings that are equal: one file named twice, which the search for files explains better
        if first < place and (source.name or sources[first].name):
            problems.append(
                ConfigError(
                    f"{where}[{place}] and [{first}] are both called {names[place]!r}",
                    "the log and the report tell sources apart by their names",
                    f"give one of them another: {{path: {source.path}, name: OTHER}}",
                )
            )
    return problems


def _weight_and_epochs(what: str) -> ConfigError:
    return ConfigError(
        what,
        "a weight is a share of all rows, epochs are passes over the source itself: each decides the other",
        "give all sources a weight, or only epochs",
    )
