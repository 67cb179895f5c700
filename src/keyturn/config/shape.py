"""From plain data to a model, and from what pydantic refuses to problems that quote nothing.

Every field carries the form that is expected of it (`Form`, else its description): the same words
stand in the error, where pydantic would print the input, and in the configuration reference.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import UnionType
from typing import Any, ClassVar, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from keyturn.config.file import Document, Loc, Problem, did_you_mean


class Section(BaseModel):
    """A part of the file: frozen, no unknown keys, no conversions between types."""

    beside: ClassVar[tuple[str, ...]] = ()  # keys that stand beside these and are read elsewhere
    rule: ClassVar[str] = "values that fit together"  # what a check of the whole section expects

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, hide_input_in_errors=True)


Model = TypeVar("Model", bound=BaseModel)


def shape(
    model: type[Model], data: object, *, document: Document, at: Loc, problems: list[Problem]
) -> Model | None:
    """Return the data as this model, or None and all that is wrong with it as problems."""
    if not isinstance(data, dict):
        problems.append(document.problem(at, "expected a mapping"))
        return None
    try:
        return model.model_validate(data)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
    # Outside of the handler: pydantic's error quotes the input and must not hang on ours.
    problems.extend(_render(model, data, found, document, at))
    return None


def _render(
    model: type[BaseModel], data: dict[str, Any], errors: list[Any], document: Document, at: Loc
) -> Iterator[Problem]:
    for error in errors:
        loc, field, owner = _resolve(model, data, error["loc"])
        place = (*at, *loc)
        if error["type"] == "extra_forbidden":
            known = {*(owner.model_fields if owner else ()), *getattr(owner, "beside", ())}
            text, code = f"unknown key: {did_you_mean(loc[-1], known)}", "unknown-key"
        elif error["type"] == "missing":
            text, code = f"required: expected {form_of(field)}", "required"
        elif error["type"] == "value_error" and (rule := _rule(model, owner, field, loc)):
            text, code = f"expected {rule}", "together"
        else:
            text, code = f"expected {form_of(field)}", "value"
        yield document.problem(place, text, code)


def _resolve(
    model: type[BaseModel], data: Any, loc: Loc
) -> tuple[Loc, FieldInfo | None, type[BaseModel] | None]:
    """Walk model and data along a place; parts that are in neither (names of union branches) go."""
    owner: type[BaseModel] | None = model
    kept: list[str | int] = []
    field: FieldInfo | None = None
    for index, part in enumerate(loc):
        fields = _fields(owner)
        inside = isinstance(data, list) or (isinstance(data, dict) and part in data)
        if not inside and part not in fields and index < len(loc) - 1:
            continue
        kept.append(part)
        if isinstance(part, str) and owner is not None:
            field = fields.get(part)
            if field is not None:
                owner = _model_in(field.annotation, loc[index + 1 :]) if loc[index + 1 :] else owner
        data = (
            data[part]
            if isinstance(data, list) and isinstance(part, int)
            else (data.get(part) if isinstance(data, dict) else None)
        )
    return tuple(kept), field, owner


def _rule(
    model: type[BaseModel], owner: type[BaseModel] | None, field: FieldInfo | None, loc: Loc
) -> str | None:
    """Return what the check of a whole section expects, if the place is one section."""
    if not loc:
        return getattr(model, "rule", None)
    if field is None:  # a section under a name that people chose, or such a name
        return None if loc[-1] == "[key]" else getattr(owner, "rule", None)
    annotation = field.annotation
    if get_origin(annotation) is UnionType:  # a section that may be left out
        annotation = next(_models(annotation), None)
    return getattr(annotation, "rule", None)


def _fields(model: type[BaseModel] | None) -> dict[str, FieldInfo]:
    if model is None:
        return {}
    return {info.alias or name: info for name, info in model.model_fields.items()}


def _model_in(annotation: Any, rest: Loc) -> type[BaseModel] | None:
    """Return the model inside an annotation: the one that knows the rest of the place, if several."""
    models = list(_models(annotation))
    for model in models:
        if any(part in _fields(model) for part in rest):
            return model
    return models[0] if models else None


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models(argument)


def form_of(field: FieldInfo | None) -> str:
    """Return what is expected of a field: its form, else its description, else its type."""
    if field is None:
        return "another value here"
    for note in field.metadata:
        # Adapters bring a Form of their own: they stand below this layer.
        if isinstance(text := getattr(note, "text", None), str):
            return text
    return field.description or _type_name(field.annotation)


def _type_name(annotation: Any) -> str:
    names = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
    options = [names[a] for a in (annotation, *get_args(annotation)) if a in names]
    return " or ".join(options) or "a value of another form"
