"""Read JSON that a strict decoder rejects: fields of a wrong type, values and strings that are not JSON."""

import functools
import json
import math
import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any, Final, NamedTuple, TypeVar

import msgspec
from msgspec import inspect

__all__ = ["Fitted", "Misfit", "dumped", "fit", "fitted", "loads", "object_in", "plain", "shape_of"]

T = TypeVar("T", bound=msgspec.Struct)
_SURROGATE: Final = re.compile("[\ud800-\udfff]")
_INNER_SURROGATE: Final = re.compile("(?<!^)[\udc00-\udfff]|[\ud800-\udbff](?!\\Z)")
_LONGEST_INT: Final = 19
# Fields that make up an answer: without one of these (an unusable type) a piece of the answer would be missing.
_NEEDED: Final = frozenset(
    {
        "arguments",
        "choices",
        "content",
        "content_block",
        "delta",
        "function",
        "message",
        "name",
        "partial_json",
        "reasoning",
        "reasoning_content",
        "refusal",
        "text",
        "thinking",
        "tool_calls",
        "tool_plan",
        "type",
    }
)


class Misfit(ValueError):
    """A field of the answer itself has an unusable type."""


class Fitted(NamedTuple):
    """An event that was read leniently.

    ``payload``: the event as strict JSON. ``left_out``: paths of omitted fields. ``halves``: a text begins or ends with
    half of a surrogate pair, whose other half may be in a neighbouring event.
    """

    event: Any
    payload: bytes
    left_out: list[str]
    halves: bool


@functools.cache
def shape_of(expected: object) -> inspect.Type:
    """Return the shape of a struct, for `fitted`."""
    return inspect.type_info(expected)


def loads(payload: bytes) -> Any:
    """Decode JSON that may contain NaN, infinities, raw control characters and halves of surrogate pairs.

    Invalid UTF-8 becomes U+FFFD; numbers that are not finite become None.

    Raises:
        ValueError: ``payload`` is not JSON.
        RecursionError: it is nested too deeply.
    """
    return _lenient.decode(payload.decode("utf-8", "replace"))


def dumped(value: Any) -> bytes:
    """Return a value of `loads` as strict JSON; halves of surrogate pairs are escapes."""
    return json.dumps(value, separators=(",", ":"), default=_nothing).encode()


def fitted(tree: dict[str, Any], expected: type, shape: inspect.Type) -> Fitted:
    """Return ``tree`` as the struct ``expected``: convertible values are converted, others are omitted.

    Raises:
        Misfit: a misfit field is part of the answer itself.
    """
    fitting = _Fitting()
    whole = fitting.value(tree, shape, "$", needed=True)
    try:
        event: Any = msgspec.convert(whole, expected)
    except msgspec.ValidationError as error:
        raise Misfit(str(error)) from error
    return Fitted(event, dumped(plain(tree)), fitting.left_out, fitting.halves)


def object_in(payload: bytes, name: str) -> dict[str, Any]:
    """Return an object within a JSON object as plain values."""
    try:
        found = msgspec.json.decode(payload)[name]
    except ValueError:
        found = plain(loads(payload).get(name))
    return found if isinstance(found, dict) else {}


def fit(raw: dict[str, Any], expected: type[T]) -> T:
    """Return an object of counts as a struct of optional fields, without misfit fields."""
    return msgspec.convert(_Fitting().value(raw, shape_of(expected), "$", needed=False), expected)


class _Unfit(Exception):
    pass


class _Fitting:
    def __init__(self) -> None:
        self.left_out: list[str] = []
        self.halves = False

    def value(self, value: Any, shape: inspect.Type, path: str, needed: bool) -> Any:
        match shape:
            case inspect.UnionType():
                return self._union(value, shape, path, needed)
            case inspect.StructType() if isinstance(value, dict):
                return self._struct(value, shape, path)
            case inspect.ListType():
                items = value if isinstance(value, list) else [value] if isinstance(value, dict) else None
                if items is None:
                    raise _Unfit
                return self._list(items, shape, path, needed)
            case inspect.StrType() if isinstance(value, str):
                return self._string(value, needed)
            case inspect.StrType() if not needed and isinstance(value, int | float) and not isinstance(value, bool):
                return str(value)
            case inspect.RawType():
                return msgspec.Raw(dumped(plain(value)))
            case inspect.AnyType():
                return self._tree(value) if needed else plain(value)
            case inspect.DictType() if isinstance(value, dict):
                return self._tree(value) if needed else plain(value)
            case _ if type(shape) in _SCALARS:
                return _SCALARS[type(shape)](value)
        raise _Unfit

    def _union(self, value: Any, shape: inspect.UnionType, path: str, needed: bool) -> Any:
        # try members that accept the value as it is before those that convert it
        members = sorted(shape.types, key=lambda member: not _is_natural(value, member))
        for member in members:
            try:
                return self.value(value, member, path, needed)
            except _Unfit:
                continue
        raise _Unfit

    def _struct(self, value: dict[str, Any], shape: inspect.StructType, path: str) -> dict[str, Any]:
        kept: dict[str, Any] = {}
        for field in shape.fields:
            name = field.encode_name
            if name not in value:
                continue
            needed = name in _NEEDED
            try:
                kept[name] = self.value(value[name], field.type, f"{path}.{name}", needed)
            except _Unfit:
                self._leave_out(value[name], f"{path}.{name}", needed)
        return kept

    def _list(self, items: list[Any], shape: inspect.ListType, path: str, needed: bool) -> list[Any]:
        kept: list[Any] = []
        for number, item in enumerate(items):
            try:
                kept.append(self.value(item, shape.item_type, f"{path}[{number}]", needed))
            except _Unfit:
                self._leave_out(item, f"{path}[{number}]", needed)
        return kept

    def _leave_out(self, value: Any, path: str, needed: bool) -> None:
        if value is None:
            return
        if needed:
            raise Misfit(f"{path} has the type {_kind(value)}")
        self.left_out.append(path)

    def _tree(self, value: Any) -> Any:
        """Return a part of the answer without a declared shape; halves at the ends of its texts are kept."""
        if isinstance(value, str):
            return self._string(value, needed=True)
        if isinstance(value, dict):
            return {plain(name): self._tree(item) for name, item in value.items()}
        if isinstance(value, list):
            return [self._tree(item) for item in value]
        return value

    def _string(self, value: str, needed: bool) -> str:
        if not _SURROGATE.search(value):
            return value
        if not needed:
            return _SURROGATE.sub("\ufffd", value)
        self.halves = True
        return _INNER_SURROGATE.sub("\ufffd", value)


def _whole_number(value: Any) -> int:
    if isinstance(value, str) and re.fullmatch(r"-?\d{1,18}", value):
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise _Unfit


def _real_number(value: Any) -> float:
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise _Unfit from None
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    raise _Unfit


def _decimal(value: Any) -> Decimal:
    return Decimal(repr(_real_number(value)))


def _truth(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    raise _Unfit


def _none(value: Any) -> None:
    if value is not None:
        raise _Unfit


_SCALARS: Final[dict[type, Callable[[Any], Any]]] = {
    inspect.IntType: _whole_number,
    inspect.FloatType: _real_number,
    inspect.DecimalType: _decimal,
    inspect.BoolType: _truth,
    inspect.NoneType: _none,
}
_NATURAL: Final[dict[type, tuple[type, ...]]] = {
    inspect.StrType: (str,),
    inspect.IntType: (int,),
    inspect.FloatType: (float, int),
    inspect.DecimalType: (float, int),
    inspect.BoolType: (bool,),
    inspect.NoneType: (type(None),),
    inspect.StructType: (dict,),
    inspect.DictType: (dict,),
    inspect.ListType: (list,),
}


def _is_natural(value: Any, member: inspect.Type) -> bool:
    return type(value) in _NATURAL.get(type(member), ())


def plain(value: Any) -> Any:
    """Return a value reduced to what strict JSON can express."""
    if isinstance(value, str):
        return _SURROGATE.sub("\ufffd", value)
    if isinstance(value, dict):
        return {_SURROGATE.sub("\ufffd", name): plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value


def _kind(value: Any) -> str:
    names = {dict: "object", list: "array", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")


def _nothing(_value: object) -> None:
    return None


def _number(text: str) -> float | None:
    value = float(text)
    return value if math.isfinite(value) else None


def _whole(text: str) -> int | float | None:
    return int(text) if len(text) <= _LONGEST_INT else _number(text)


_lenient: Final = json.JSONDecoder(strict=False, parse_constant=_nothing, parse_float=_number, parse_int=_whole)
