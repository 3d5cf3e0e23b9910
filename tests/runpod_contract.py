"""RunPod's own OpenAPI document as a judge of what is sent and what is answered: every field known, every type right."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache, cached_property
from pathlib import Path
from typing import Any

SPECS_VARIABLE = "TRAINWAY_SPECS"
DOCUMENT = "runpod-openapi-v2.json"


@cache
def contract(folder: Path) -> Contract:
    """One for all tests of a process: the document is large."""
    return Contract(folder)


class Contract:
    """`check_*` return what is wrong, one line each. Stricter than the document: a field that it does not name is wrong."""

    def __init__(self, folder: Path) -> None:
        self._document = json.loads((folder / DOCUMENT).read_text(encoding="utf-8"))
        self._judges: dict[int, Any] = {}

    @cached_property
    def _operations(self) -> list[tuple[str, re.Pattern[str], Mapping[str, Any]]]:
        found = []
        for path, methods in self._document["paths"].items():
            pattern = re.compile(re.sub(r"\\\{[^}]*\\\}", "[^/]+", re.escape(path)))
            shared = methods.get("parameters", [])
            for method, operation in methods.items():
                if method in ("get", "post", "put", "patch", "delete"):
                    all_of = {**operation, "parameters": [*shared, *operation.get("parameters", [])]}
                    found.append((method.upper(), pattern, all_of))
        return found

    def check_request(
        self, method: str, path: str, query: Mapping[str, str], headers: Mapping[str, str], body: Any
    ) -> list[str]:
        operation = self._operation(method, path)
        if operation is None:
            return [f"{method} {path}: no such operation"]
        wrong: list[str] = []
        known = [self._resolved(parameter) for parameter in operation["parameters"]]
        by_name = {parameter["name"]: parameter for parameter in known if parameter["in"] == "query"}
        for name, text in query.items():
            if name not in by_name:
                wrong.append(f"{method} {path}: no such parameter {name}")
            else:
                schema = by_name[name]["schema"]
                wrong += self._judge(f"{method} {path}?{name}", schema, _typed(text, self._resolved(schema)))
        content = operation.get("requestBody", {}).get("content", {}).get("application/json")
        if content is None:
            return wrong + ([f"{method} {path}: takes no body"] if body is not None else [])
        if headers.get("content-type", "").split(";")[0] != "application/json":
            wrong.append(f"{method} {path}: the body is {headers.get('content-type')}")
        return wrong + self._judge(f"{method} {path}", content["schema"], body)

    def check_answer(self, method: str, path: str, status: int, body: Any) -> list[str]:
        operation = self._operation(method, path)
        if operation is None:
            return [f"{method} {path}: no such operation"]
        answers = operation["responses"]
        answer = self._resolved(answers.get(str(status)) or answers["default"])
        content = next(iter(answer.get("content", {}).values()), None)
        what = f"answer {status} to {method} {path}"
        if content is None:
            return [] if body is None else [f"{what}: has a body"]
        return self._judge(what, content["schema"], body)

    def _operation(self, method: str, path: str) -> Mapping[str, Any] | None:
        for known, pattern, operation in self._operations:
            if known == method and pattern.fullmatch(f"/v2{path}"):
                return operation
        return None

    def _judge(self, what: str, schema: Any, value: Any) -> list[str]:
        from jsonschema import Draft202012Validator

        key = id(schema)  # of a part of the document, which lives as long as we do
        if key not in self._judges:
            self._judges[key] = Draft202012Validator(self._strict(schema))
        found = self._judges[key].iter_errors(value)
        return [f"{what}: {error.json_path}: {error.message}" for error in found]

    def _resolved(self, schema: Any) -> Any:
        while isinstance(schema, dict) and "$ref" in schema:
            found: Any = self._document
            for part in schema["$ref"].removeprefix("#/").split("/"):
                found = found[part]
            schema = found
        return schema

    def _strict(self, schema: Any, *, is_part: bool = False) -> Any:
        """The schema with all references put in, and objects closed where they are used."""
        if not isinstance(schema, dict):
            return schema
        if "$ref" in schema:
            return self._strict(self._resolved(schema), is_part=is_part)
        found = dict(schema)
        if "allOf" in found:
            found["allOf"] = [self._strict(part, is_part=True) for part in found["allOf"]]
        for word in ("anyOf", "oneOf"):
            if word in found:
                found[word] = [self._strict(part) for part in found[word]]
        if "properties" in found:
            found["properties"] = {name: self._strict(part) for name, part in found["properties"].items()}
        for word in ("items", "additionalProperties"):
            if word in found:
                found[word] = self._strict(found[word])
        closed = "additionalProperties" in found or "unevaluatedProperties" in found
        if _is_object(found) and not is_part and not closed:
            found["unevaluatedProperties"] = False
        return found


def _is_object(schema: Mapping[str, Any]) -> bool:
    return "properties" in schema or any(_is_object(part) for part in schema.get("allOf", ()))


def _typed(text: str, schema: Mapping[str, Any]) -> Any:
    match schema.get("type"):
        case "array":
            return text.split(",")
        case "integer":
            return int(text) if re.fullmatch(r"-?\d+", text) else text
        case "boolean":
            return {"true": True, "false": False}.get(text, text)
    return text
