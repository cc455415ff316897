"""How a kind stands in the API: its names, columns and validation rules, written beside its model.

Plain values for the generator in ``crd.py``. The rules are CEL that the API server evaluates; this project never does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from pydantic import BaseModel, JsonValue

Extra = dict[str, JsonValue]
"""Keywords that pydantic merges into the schema of a model or field."""

AGE_PATH: Final = ".metadata.creationTimestamp"


@dataclass(frozen=True, slots=True)
class Column:
    """One column of `kubectl get`."""

    name: str
    path: str
    """JSONPath from the root of the object."""
    type: str = "string"
    """string, integer or date. A date is printed as time since; one in the future prints as <invalid>."""
    wide: bool = False
    """Shown with `-o wide` only."""


AGE: Final = Column("Age", AGE_PATH, "date")


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of the API group; its description, spec and status are those of `model`."""

    model: type[BaseModel]
    plural: str
    short_name: str
    columns: tuple[Column, ...]
    namespaced: bool = True
    selectable: tuple[str, ...] = ()
    """JSONPaths of string fields by which `--field-selector` finds objects."""
    name_rule: JsonValue = None
    """Validation rule of the whole object on its name; see `name_limit`."""

    @property
    def name(self) -> str:
        """The kind, e.g. GpuLease."""
        return self.model.__name__

    @property
    def has_status(self) -> bool:
        """Whether objects have the status subresource."""
        return "status" in self.model.model_fields


def condition_column(name: str, condition: str, field: str = "reason", *, wide: bool = False) -> Column:
    """Column that shows a field of one condition."""
    return Column(name, f'.status.conditions[?(@.type=="{condition}")].{field}', wide=wide)


def rule(cel: str, message: str, *, computed: str = "", field: str = "", forbids: bool = False) -> JsonValue:
    """Validation rule of the schema it is put on.

    `message` says what is wrong and what to do; `computed` is CEL for the same sentence with the value in it. `field`
    is the path, from that schema, of the field at fault. `forbids`: the fault is that the value is there or has
    changed, not which it is, so the API server need not repeat it.

    `computed` may take in bounded strings only: the API server reckons the text of a number or time as boundless, and
    refuses the rule as too costly.
    """
    keywords: dict[str, JsonValue] = {"rule": cel, "message": message}
    if computed:
        keywords["messageExpression"] = computed
    if field:
        keywords["fieldPath"] = field
    if forbids:
        keywords["reason"] = "FieldValueForbidden"
    return keywords


def name_limit(length: int, pattern: str, remedy: str) -> JsonValue:
    """Rule on an object's name, where other objects are named after it: at most `length` characters that match the
    regular expression `pattern`. `remedy` says which names fit and why: the end of the sentence "metadata.name … ".
    """
    name = "self.metadata.name"
    return rule(
        f"{name}.size() <= {length} && {name}.matches('{pattern}')",
        f"metadata.name {remedy}",
        computed=f"'metadata.name ' + {name} + ' {remedy}'",
        field=".metadata.name",
    )


def rules(*each: JsonValue) -> Extra:
    """Schema keywords that carry validation rules."""
    return {"x-kubernetes-validations": list(each)}


def immutable(field: str, message: str) -> JsonValue:
    """Rule, on the parent, for an optional field that may not be set, changed or removed after creation.

    On the field itself a transition rule would be skipped when the field appears or goes.
    """
    unchanged = f"has(self.{field}) == has(oldSelf.{field}) && (!has(self.{field}) || self.{field} == oldSelf.{field})"
    return rule(unchanged, message, field=f".{field}", forbids=True)


def replaced_whole() -> Extra:
    """Schema keyword of an object that one writer replaces as a whole.

    The API server then keeps one entry on who owns it instead of one for every field, condition by condition: a fourth
    less work with each write of a status.
    """
    return {"x-kubernetes-map-type": "atomic"}


def list_map(*keys: str) -> Extra:
    """Schema keywords of a list whose items are told apart, and merged, by these fields."""
    return {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": list(keys)}
