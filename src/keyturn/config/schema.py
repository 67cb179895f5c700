"""The JSON schema of the configuration, for editors: made from the models that the loader goes by.

Draft-07, which editors' YAML servers know best. It refuses nothing that the loader accepts; what holds
between several keys, names and files only the loader can tell (`keyturn check`).

    python -m keyturn.config.schema > docs/reference/keyturn.schema.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Le, MaxLen, MinLen
from pydantic import BaseModel, BeforeValidator, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from keyturn.config import models, verifying
from keyturn.config.reference import default_of
from keyturn.config.shape import form_of
from keyturn.credential_file import credential_path
from keyturn.destinations import registry
from keyturn.errors import ConfigError

Schema = dict[str, Any]

DIALECT = "http://json-schema.org/draft-07/schema#"
TYPES = ("aws", "azure", "file", "vault")
_DURATION = (
    "^(?=[0-9])" + "".join(f"([0-9]{{1,6}}{u})?" for u in ("w", "d", "h", "m", "s", "ms")) + "$"
)
_TEXT: Schema = {"type": "string"}
_SECTIONS: Mapping[str, type[BaseModel]] = {
    "store": models.StoreSettings,
    "log": models.LogSettings,
    "verifier": verifying.VerifierSection,
    "admin": models.AdminSettings,
    "reload": models.ReloadSettings,
}


def schema(*, agents_only: bool = False) -> Schema:
    """Return the schema of the main file, or of an included one, which holds agents only."""
    agents = _by_name(_of_model(models.AgentSection), "the agents, by id")
    if agents_only:
        made = _object({"version": {"const": 1}, "agents": agents}, ["agents"])
        return {"$schema": DIALECT, "title": "Keyturn, a file of agents", **made}
    made = _of_model(models.TopSection)
    made["properties"] |= {name: _of_model(model) for name, model in _SECTIONS.items()}
    made["properties"] |= {
        "connections": _by_name(_connection(), "ways to reach destinations, by name"),
        "policies": _by_name(_policy(), "when credentials rotate, by name"),
        "agents": agents,
    }
    return {"$schema": DIALECT, "title": "Keyturn, the main file", **made}


def _object(properties: Schema, required: list[str]) -> Schema:
    made: Schema = {"type": "object", "additionalProperties": False, "properties": properties}
    return made | ({"required": required} if required else {})


def _by_name(value: Schema, description: str) -> Schema:
    return {
        "type": "object",
        "description": description,
        "propertyNames": {"pattern": _whole(models.ID.pattern)},
        "additionalProperties": value,
    }


def _policy() -> Schema:
    return _of_model(models.PolicySection) | {"not": {"required": ["every", "cron"]}}


def _connection() -> Schema:
    """Return what a connection may hold, by its type; types of other packages are let through."""
    known = {}
    for kind in TYPES:
        try:
            options = _of_model(registry.load(kind).Options)
        except ConfigError:  # its library is not installed here
            continue
        options["properties"] = {"type": {"const": kind}, **options["properties"]}
        known[kind] = options
    kind_of = {"description": "type of destination", "anyOf": [{"enum": list(TYPES)}, _TEXT]}
    return {
        "type": "object",
        "required": ["type"],
        "properties": {"type": kind_of},
        "allOf": [
            {"if": {"properties": {"type": {"const": kind}}}, "then": options}
            for kind, options in known.items()
        ],
    }


def _of_model(model: type[BaseModel]) -> Schema:
    fields = {info.alias or name: info for name, info in model.model_fields.items()}
    required = [name for name, info in fields.items() if info.is_required()]
    made = _object({name: _of_field(info) for name, info in fields.items()}, required)
    text = (model.__doc__ or "").strip()
    return made | ({"description": text} if text else {})


def _of_field(info: FieldInfo) -> Schema:
    form, default = form_of(info), default_of(info).replace("`", "")
    about = info.description or ""
    about += f"; expected: {form}" if about and form != about else "" if about else form
    made = _value(info.annotation, info.metadata)
    if _takes_null(info) and made:
        made = {"anyOf": [made, {"type": "null"}]}
    return made | {
        "description": f"{about}; {default if default == 'required' else f'default: {default}'}"
    }


def _takes_null(info: FieldInfo) -> bool:
    """Tell by trying: an optional value may still have to be left away."""
    annotation: Any = (
        Annotated[(info.annotation, *info.metadata)] if info.metadata else info.annotation
    )
    try:
        TypeAdapter(annotation).validate_python(None, strict=True)
    except ValidationError:
        return False
    return True


def _value(annotation: Any, notes: list[Any]) -> Schema:
    """Return the form of what may stand in the file, which a validator turns into the annotation."""
    if get_origin(annotation) is Annotated:
        base, *more = get_args(annotation)
        return _value(base, [*more, *notes])
    if get_origin(annotation) in (Union, UnionType):
        found = [_value(one, notes) for one in get_args(annotation) if one is not type(None)]
        return found[0] if len(found) == 1 else {"anyOf": found}
    read_by = [note.func for note in notes if isinstance(note, BeforeValidator)]
    if read_by and get_origin(annotation) is not Literal:
        return _read_by(annotation, read_by)
    return _plain(annotation, notes)


def _read_by(annotation: Any, functions: list[Any]) -> Schema:
    if annotation is models.MaxAge:
        return {"anyOf": [{"enum": ["none"]}, _duration(), _of_model(models.MaxAge)]}
    if annotation is timedelta:
        manual = functions[-1] is models.read_interval
        return {"anyOf": [{"enum": ["manual"]}, _duration()]} if manual else _duration()
    if annotation is Path:
        given = credential_path in functions
        return _TEXT | {"pattern": "^(/|credential:)" if given else "^/"}
    if get_origin(annotation) in (dict, Mapping):
        return _plain(annotation, [])
    for one in functions:
        if isinstance(one, partial):
            return _TEXT | {"pattern": _whole(one.args[0].pattern)}
    return dict(_TEXT)


def _duration() -> Schema:
    return _TEXT | {"pattern": _DURATION}


def _plain(annotation: Any, notes: list[Any]) -> Schema:
    origin = get_origin(annotation)
    if origin is Literal:
        return {"enum": list(get_args(annotation))}
    if origin in (list, tuple):
        return {"type": "array", "items": _value(get_args(annotation)[0], [])} | _limits(
            notes, "Items"
        )
    if origin in (dict, Mapping):
        return {"type": "object", "additionalProperties": _value(get_args(annotation)[1], [])}
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return _of_model(annotation)
    if annotation in (int, bool):
        return {"type": "integer" if annotation is int else "boolean"} | _bounds(notes)
    return _TEXT | _limits(notes, "Length") if annotation is str else {}


def _bounds(notes: list[Any]) -> Schema:
    found: Schema = {}
    for note in notes:
        if isinstance(note, Ge):
            found["minimum"] = note.ge
        elif isinstance(note, Le):
            found["maximum"] = note.le
    return found


def _limits(notes: list[Any], what: str) -> Schema:
    found: Schema = {}
    for note in notes:
        if isinstance(note, MinLen):
            found[f"min{what}"] = note.min_length
        elif isinstance(note, MaxLen):
            found[f"max{what}"] = note.max_length
        elif isinstance(pattern := getattr(note, "pattern", None), str):
            found["pattern"] = pattern
    return found


def _whole(pattern: str) -> str:
    return f"^(?:{pattern})$"


if __name__ == "__main__":
    sys.stdout.write(json.dumps(schema(), indent=2) + "\n")
