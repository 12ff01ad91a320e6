"""Identify the tool calls of an answer, even if a provider's indexes and ids are unreliable.

OpenAI numbers parallel calls. Some compatible servers send index 0 for all calls, or no index; repeat id and name with
every fragment, or leave the id empty; send arguments as an object, or nothing for a tool without parameters.
"""

import re
from typing import Any, Final

import msgspec

from schemas.events import ToolCall
from services.producer.core.bounds import number

__all__ = ["CALLS", "ToolCalls"]

CALLS: Final = 1_000
"""Bound of the calls of one answer, over all choices."""
_OUTSIDE: Final = re.compile(r'["{}\[\]]')
_INSIDE: Final = re.compile(r'["\\]')


class ToolCalls:
    """Assign every call an index of its own within its choice: 0, 1 … in the order in which calls begin.

    A new id begins a new call; without ids a new name does, or a new object after complete arguments. A fragment
    without an id belongs to the newest call of the provider's index, or to the call that began last. Id and name are
    returned once for each call.
    """

    def __init__(self) -> None:
        self._choices: dict[int, list[_Call]] = {}
        self._newest: dict[tuple[int, int | None], _Call] = {}  # by choice and the provider's index
        self._count = 0  # of all choices, at most `CALLS`

    def take(
        self,
        choice: int,
        index: object,
        id_: object,
        name: object,
        arguments: object,
        *,
        beside: bool = False,
        signature: str | None = None,
    ) -> list[ToolCall]:
        """Return a provider's fragment with our index; ``index`` is the provider's.

        ``beside``: it follows a fragment of another call in the same list, so a name begins a new call.

        Raises:
            ValueError: there are more than `CALLS` calls.
        """
        position = _position(index)
        identity, function, text = _text(id_), _text(name), _json_text(arguments)
        if identity is None and function is None and position is not None and (choice, position) in self._newest:
            call: _Call | None = self._newest[choice, position]  # nearly all fragments
        elif beside and function and identity is None and position is None:
            call = None
        else:
            call = _find(
                self._choices.get(choice, []), self._newest.get((choice, position)), position, identity, function, text
            )
        if call is None:
            call = self._begin(choice, position)
        elif identity is not None and call.repeated(identity, text):
            return []
        taken: list[ToolCall] = []
        while True:
            cut = call.arguments.feed(text)
            whole = cut == len(text)
            fragment = call.fragment(identity, function, text if whole else text[:cut], signature)
            if fragment is not None:
                taken.append(fragment)
            if whole:
                return taken
            # A second object after the first one: the same function is called again.
            text, function, signature = text[cut:], call.name, None
            call = self._begin(choice, position)

    def end(self, choice: int, index: object) -> list[ToolCall]:
        """End the newest call of a provider's index: no arguments mean an empty object."""
        call = self._newest.get((choice, _position(index)))
        return [] if call is None else call.end()

    def end_all(self, choice: int) -> list[ToolCall]:
        """End all calls of a finished choice."""
        return [fragment for call in self._choices.get(choice, ()) for fragment in call.end()]

    def abandon(self, choice: int) -> None:
        """Mark the calls of a cut-off choice as ended, without completing their arguments."""
        for call in self._choices.get(choice, ()):
            call.ended = True

    @property
    def choices(self) -> list[int]:
        """Return the choices that call tools."""
        return list(self._choices)

    def _begin(self, choice: int, position: int | None) -> "_Call":
        self._count += 1
        if self._count > CALLS:
            raise ValueError(f"an answer with more than {CALLS} tool calls")
        calls = self._choices.setdefault(choice, [])
        call = _Call(len(calls), position)
        calls.append(call)
        self._newest[choice, position] = call
        return call


class _Call:
    """One call: ``number`` is our index, ``position`` the provider's."""

    __slots__ = ("_texts", "arguments", "ended", "id", "name", "number", "position")

    def __init__(self, number: int, position: int | None) -> None:
        self.number = number
        self.position = position
        self.id: str | None = None
        self.name: str | None = None
        self.arguments = _Json()
        self.ended = False
        self._texts: list[str] = []

    def repeated(self, id_: str, text: str) -> bool:
        """Return whether ``text`` repeats the whole arguments, as some servers do at the end."""
        return id_ == self.id and self.arguments.complete and bool(text) and text == "".join(self._texts)

    def fragment(self, id_: str | None, name: str | None, text: str, signature: str | None) -> ToolCall | None:
        """Return the new piece of the call, if there is any."""
        new_id = new_name = None
        if id_ is not None and self.id is None:
            self.id = new_id = id_
        if name is not None and self.name is None:
            self.name = new_name = name
        if not (text or new_id or new_name or signature):
            return None
        self._texts.append(text)
        return ToolCall(index=self.number, id=new_id, name=new_name, arguments=text, signature=signature)

    def end(self) -> list[ToolCall]:
        """Return an empty object if no arguments came."""
        ended, self.ended = self.ended, True
        return [] if ended or not self.arguments.blank else [ToolCall(index=self.number, arguments="{}")]


class _Json:
    """Follow a JSON text over its fragments.

    ``blank``: only white space so far. ``complete``: an object or list has ended.
    """

    __slots__ = ("_depth", "_escaped", "_quoted", "blank", "complete")

    def __init__(self) -> None:
        self._depth = 0
        self._quoted = False
        self._escaped = False
        self.blank = True
        self.complete = False

    def feed(self, text: str) -> int:
        """Add a fragment; return the index in it at which a new object follows a complete value, else its length."""
        if self.blank:
            self.blank = not text or text.isspace()
        at, end = 0, len(text)
        if self._escaped and text:
            self._escaped, at = False, 1
        while at < end:
            match = (_INSIDE if self._quoted else _OUTSIDE).search(text, at)
            if match is None:
                break
            mark, at = match[0], match.end()
            if mark == "\\":
                self._escaped, at = at == end, at + 1
            elif mark == '"':
                self._quoted = not self._quoted
            elif mark in "{[":
                if self.complete and self._depth == 0 and mark == "{":
                    return match.start()
                self._depth += 1
            else:
                self._depth = max(0, self._depth - 1)
                self.complete = self._depth == 0
        return end


def _find(
    calls: list[_Call], newest: _Call | None, position: int | None, id_: str | None, name: str | None, text: str
) -> _Call | None:
    """Return the call that a fragment continues, or ``None`` if it begins a new one.

    ``newest``: the call that began last under the provider's index.
    """
    if not calls:
        return None
    if position is None:
        newest = calls[-1]
    if id_ is not None:
        for call in reversed(calls):
            if call.id == id_ and (position is None or call.position is None or call.position == position):
                return call
        return newest if newest is not None and _takes_id(newest, name, text) else None
    if newest is None:
        # Neither id nor name, under an index without a call: it continues the open call.
        return calls[-1] if name is None and not calls[-1].arguments.complete else None
    return newest if name is None or newest.name in (None, name) else None


def _takes_id(call: _Call, name: str | None, text: str) -> bool:
    """Return whether an unseen id belongs to ``call``: the id came late, or each fragment has a new id."""
    if name is not None and call.name not in (None, name):
        return False
    if call.id is None:
        return not text or not call.arguments.complete
    return name is None and not call.arguments.blank and not call.arguments.complete


def _position(index: object) -> int | None:
    """Return a provider's index; it may be negative because it only identifies calls."""
    return index if isinstance(index, int) else number(index)


def _text(value: object) -> str | None:
    if value is None or isinstance(value, str):
        return value or None
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else None


def _json_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return "" if value is None else msgspec.json.encode(value).decode()
