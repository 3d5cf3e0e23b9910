"""The columns that rows of JSON need in a table: their names in order, and a type that holds every value."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

MAX_FIELDS = 64
"""An object with more fields than this is a mapping, not a record: it is kept as JSON text."""
_INT64 = range(-(2**63), 2**63)

# None: only nulls so far. "json": no common type. ("list", kind of the elements). ("object", *columns).
Kind = None | str | tuple[Any, ...]


class Column(NamedTuple):
    """A column, or a field of an object."""

    name: str
    kind: Kind


class Columns:
    """Finds the columns of rows that are added one by one; a null fits every column."""

    def __init__(self) -> None:
        self._columns: dict[str, Kind] = {}

    def add(self, row: dict[str, Any]) -> None:
        known = self._columns
        if not row.keys() <= known.keys():
            known = self._columns = dict.fromkeys(_merged_order(list(known), list(row)), None) | known
        for name, value in row.items():
            if (kind := known[name]) != "str" or type(value) is not str:
                known[name] = _merge(kind, _kind(value))

    def result(self) -> list[Column]:
        return [Column(name, kind) for name, kind in self._columns.items()]


def _kind(value: Any) -> Kind:
    match value:
        case None:
            return None
        case bool():
            return "bool"
        case str():
            return "str"
        case int():
            return "int" if value in _INT64 else "json"
        case float():
            return "float"
        case list():
            inner: Kind = None
            for entry in value:
                inner = _merge(inner, _kind(entry))
            return ("list", inner)
        case dict():
            if not 0 < len(value) <= MAX_FIELDS:
                return "json"
            return ("object", *(Column(name, _kind(entry)) for name, entry in value.items()))
        case _:
            raise TypeError(type(value))


def _merge(one: Kind, other: Kind) -> Kind:
    """The narrowest kind that holds the values of both."""
    if one == other or other is None:
        return one
    if one is None:
        return other
    if isinstance(one, tuple) and isinstance(other, tuple) and one[0] == other[0]:
        if one[0] == "list":
            return ("list", _merge(one[1], other[1]))
        return _merged_objects(one[1:], other[1:])
    return "json"


def _merged_objects(one: Iterable[Column], other: Iterable[Column]) -> Kind:
    first, second = dict(one), dict(other)
    names = _merged_order(list(first), list(second))
    if len(names) > MAX_FIELDS:
        return "json"
    return ("object", *(Column(name, _merge(first.get(name), second.get(name))) for name in names))


def _merged_order(known: list[str], names: list[str]) -> list[str]:
    """`known` with the new names put behind those that they follow in `names`: rows keep their order of fields."""
    at = next((known.index(name) for name in names if name in known), len(known))
    for name in names:
        if name in known:
            at = known.index(name) + 1
        else:
            known.insert(at, name)
            at += 1
    return known
