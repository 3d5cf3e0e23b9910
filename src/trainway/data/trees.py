"""Trees of messages (as in oasst1: one row a message, with its parent) rebuilt into conversations."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

Paths = Literal["best", "all"]

TREE_COLUMNS = ("message_id", "parent_id", "text", "role")
READY = "ready_for_export"
ROLES = {"prompter": "user", "user": "user", "assistant": "assistant"}


class _Node(NamedTuple):
    id: str
    role: str
    text: str
    rank: float  # infinite where people gave none
    order: int


def is_tree(columns: Iterable[str]) -> bool:
    """Whether rows with these columns are messages of trees."""
    return set(TREE_COLUMNS) <= set(columns)


def conversations(
    rows: Iterable[Mapping[str, Any]],
    *,
    paths: Paths = "best",
    lang: str | None = None,
    skipped: Counter[str],
) -> Iterator[dict[str, Any]]:
    """Rows with `messages`, `lang` and `message_tree_id`, in the order of the trees' first messages.

    paths: best follows the best-ranked answer at each turn, one conversation a tree; all gives one for each leaf.
    A conversation ends with an answer. Deleted messages and what hangs below them, trees that are not ready, other
    languages and messages whose parent is not among the rows are left out; `skipped` counts them by reason.
    Memory: the texts of all rows.
    """
    roots: list[tuple[_Node, dict[str, Any]]] = []
    children: dict[str, list[_Node]] = defaultdict(list)
    reachable = total = 0
    for order, row in enumerate(rows):
        reason = _unusable(row, lang)
        if reason:
            skipped[reason] += 1
            continue
        total += 1
        node = _Node(row["message_id"], ROLES[row["role"]], row["text"], _rank(row.get("rank")), order)
        if row.get("parent_id") is None:
            roots.append((node, _about(row)))
        else:
            children[row["parent_id"]].append(node)
    for replies in children.values():
        replies.sort(key=lambda node: (node.rank, node.order))
    for root, about in roots:
        reachable += _size(root, children)
        found = False
        for path in _paths(root, children, paths):
            found = True
            turns = [{"role": node.role, "content": node.text} for node in path]
            yield {"messages": turns, **about}
        if not found:
            skipped["tree without an answer"] += 1
    if total > reachable:
        skipped["parent left out or not among the rows"] += total - reachable


def _unusable(row: Mapping[str, Any], lang: str | None) -> str:
    if row.get("deleted") in (True, "True", "true"):  # in CSV everything is text
        return "deleted"
    if row.get("tree_state", READY) != READY:
        return "tree not ready"
    if lang is not None and str(row.get("lang", "")).casefold() != lang.casefold():
        return "other language"
    if row.get("role") not in ROLES:
        return "unknown role"
    text = row.get("text")
    return "" if isinstance(text, str) and text.strip() and row.get("message_id") else "empty"


def _rank(value: Any) -> float:
    rank = float("inf") if value is None else float(value)
    return float("inf") if math.isnan(rank) else rank


def _about(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a conversation keeps of its tree's first message."""
    about = {"lang": row.get("lang"), "message_tree_id": row.get("message_tree_id") or row["message_id"]}
    return {name: value for name, value in about.items() if value is not None}


def _paths(root: _Node, children: Mapping[str, list[_Node]], paths: Paths) -> Iterator[list[_Node]]:
    """The conversations of a tree, best-ranked first. No recursion: a tree may be deeper than the stack."""
    ended: set[str] = set()
    stack: list[tuple[_Node, int]] = [(root, 0)]
    path: list[_Node] = []
    while stack:
        node, depth = stack.pop()
        path[depth:] = [node]
        replies = children.get(node.id, [])
        if replies:
            stack += [(reply, depth + 1) for reply in reversed(replies)]
            continue
        # A leaf without an answer ends its conversation at the answer before it, which others may share.
        last = max((at for at, turn in enumerate(path) if turn.role == "assistant"), default=None)
        if last is not None and path[last].id not in ended:
            ended.add(path[last].id)
            yield path[: last + 1]
        if paths == "best":
            return


def _size(root: _Node, children: Mapping[str, list[_Node]]) -> int:
    size, level = 0, [root]
    while level:
        size += len(level)
        level = [reply for node in level for reply in children.get(node.id, ())]
    return size
