"""Hypothesis strategies for msgspec structs, from their type hints."""

import types
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec
from hypothesis import strategies as st

from schemas.events import AnyEvent
from schemas.requests import GenerationRecord, Request
from schemas.usage import MAX_NUMBER

EVENTS: tuple[type[Any], ...] = get_args(AnyEvent)
RECORDS: tuple[type[Any], ...] = (Request, GenerationRecord)

TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-MAX_NUMBER, MAX_NUMBER) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
PLAIN: dict[Any, st.SearchStrategy[Any]] = {
    str: TEXT,
    int: st.integers(-MAX_NUMBER, MAX_NUMBER),
    float: st.floats(allow_nan=False, allow_infinity=False),
    bool: st.booleans(),
    bytes: st.binary(max_size=40),
    type(None): st.none(),
    Any: JSON,
}


def of(hint: Any) -> st.SearchStrategy[Any]:
    """A strategy for values of a type hint as the schemas use them."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        meta = args[1]
        bounds = {"min_value": meta.ge, "max_value": meta.le}
        return st.integers(**bounds) if args[0] is int else st.floats(**bounds, allow_nan=False, allow_infinity=False)
    if origin is Literal:
        return st.sampled_from(args)
    if origin in (Union, types.UnionType):
        return st.one_of([of(arg) for arg in args])
    if origin is list:
        return st.lists(of(args[0]), max_size=3)
    if origin is tuple and args[1:] == (...,):
        return st.lists(of(args[0]), max_size=3).map(tuple)
    if origin is dict:
        return st.dictionaries(of(args[0]), of(args[1]), max_size=3)
    return PLAIN[hint] if hint in PLAIN else struct(hint)


@cache
def struct(cls: type[msgspec.Struct]) -> st.SearchStrategy[Any]:
    """A strategy for instances of a struct; fields with defaults are sometimes left out."""
    hints = get_type_hints(cls, include_extras=True)
    fields = msgspec.structs.fields(cls)
    required = {f.name: of(hints[f.name]) for f in fields if f.required}
    optional = {f.name: of(hints[f.name]) for f in fields if not f.required}
    return st.fixed_dictionaries(required, optional=optional).map(lambda values: cls(**values))


def any_event() -> st.SearchStrategy[Any]:
    return st.one_of([struct(cls) for cls in EVENTS])
