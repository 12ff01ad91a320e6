"""Parse the query parameters of streams from the raw ASGI scope."""

from collections.abc import Sequence
from typing import Any
from urllib.parse import parse_qs

__all__ = ["parse_query"]

_MAX_FIELDS = 100


def parse_query(scope: Any, names: Sequence[str], *, repeated: str | None = None) -> tuple[dict[str, str], list[str]]:
    """Return the query parameters, and all values of the ``repeated`` one.

    Raises:
        ValueError: the query is not ASCII, has an unknown parameter, or has a parameter more than once.
    """
    query = parse_qs(scope["query_string"].decode("ascii"), keep_blank_values=True, max_num_fields=_MAX_FIELDS)
    known = names if repeated is None else (*names, repeated)
    unknown = sorted(set(query) - set(known))
    if unknown:
        raise ValueError(f"unknown query parameter {unknown[0][:40]!r}: use {', '.join(known)}")
    values = query.pop(repeated, []) if repeated is not None else []
    twice = [name for name, each in query.items() if len(each) > 1]
    if twice:
        raise ValueError(f"query parameter {twice[0]!r} occurs more than once: send it once")
    return {name: each[0] for name, each in query.items()}, values
