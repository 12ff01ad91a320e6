"""Count tokens of streamed text, by the model's own byte-pair encoding where it is public.

Tokens do not end where chunks end, so counts per chunk must not be summed. A counter works on the joined text: the
count up to the last position that no token can span is final, and only the tail after it is counted again.
"""

import re
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, Final

import msgspec
import toktok

from schemas.requests import Message

__all__ = ["GenerationCounter", "TokenCounter", "count_input", "count_text", "encoding_of", "load_encodings"]

_ENCODINGS: Final = (
    (re.compile(r"gpt-oss"), "o200k_harmony"),
    (re.compile(r"(chatgpt-4o|gpt-4o|gpt-4\.[15]|gpt-[5-9]|o[134](-|:|$))"), "o200k_base"),
    (re.compile(r"gpt-(4|3\.5)(-|:|$)"), "cl100k_base"),
)
_ESTIMATE: Final = "o200k_base"

# Both families of encodings split text by a pattern into pieces before they merge bytes. No piece runs on
# - from a character that is no white space into a space;
# - from a letter or number into a line end or one of these marks, ASCII or CJK (an apostrophe is not one: it may begin
#   a contraction);
# - from a letter into a digit, or from a digit into a letter.
_SAFE: Final = re.compile(
    r"(?<=[^\W_])[\n,.;:!?()\[\]{}\"<>=+/\u2026\u3002\uff0c\u3001\uff01\uff1f\uff1b\uff1a\uff08\uff09\u300c\u300d]|(?<=[A-Za-z])[0-9]|(?<=[0-9])[A-Za-z]"
)
_SMALL: Final = 256
"""Characters up to which a tail is counted again at every read; a longer tail each time it has grown by an eighth."""

# From the accounting that OpenAI publishes for chat completions.
_PER_MESSAGE: Final = 3
_PER_NAME: Final = 1
_PRIMING: Final = 3


def count_text(text: str, encoding: str) -> int:
    """Return the number of tokens of ``text``; names of special tokens in it count as ordinary text.

    An encoding's vocabulary is loaded once in a process, by the first count (about half a second).

    Raises:
        KeyError: no such encoding.
    """
    # `truncate` counts the whole text in 0.4 µs; `batch_count` starts its threads every time, which costs 11 µs.
    count: int
    try:
        _text, count = toktok.truncate(text, sys.maxsize, encoding)
    except UnicodeEncodeError:  # half of a surrogate pair: no bytes, hence no tokens of its own
        _text, count = toktok.truncate(text.encode(errors="replace").decode(), sys.maxsize, encoding)
    return count


def load_encodings(names: Iterable[str]) -> None:
    """Load the vocabularies of encodings, and the one of estimates, before the first count needs them.

    Takes about half a second of processor time for each; unknown names are skipped.
    """
    for name in dict.fromkeys([_ESTIMATE, *names]):
        with suppress(KeyError):
            count_text("warm", name)


def encoding_of(model: str) -> tuple[str, bool]:
    """Return the encoding to count ``model`` with, and whether it is the model's own.

    Prefixes of a provider or of a fine-tuned model (``openai/gpt-4o``, ``ft:gpt-4o:org``) are ignored.
    """
    name = model.rsplit("/", 1)[-1].removeprefix("ft:").lower()
    for pattern, encoding in _ENCODINGS:
        if pattern.match(name):
            return encoding, True
    return _ESTIMATE, False


class TokenCounter:
    """Count one text while it grows.

    ``count``: the running count; between two recounts of a long tail it lags by less than an eighth of that tail.
    ``exact``: ``encoding`` is the model's own.
    """

    __slots__ = ("_counted", "_last", "_length", "_pieces", "_settled", "_tail", "encoding", "exact")

    def __init__(self, encoding: str, exact: bool) -> None:
        self.encoding = encoding
        self.exact = exact
        self._settled = 0  # tokens before the tail
        self._pieces: list[str] = []  # the tail; its work is bounded by `_SMALL` and geometric recounts
        self._length = 0  # characters of the tail
        self._counted = 0  # characters of the tail at its last count
        self._tail = 0  # tokens of the tail at its last count
        self._last = ""

    @property
    def count(self) -> int:
        """The running count in tokens."""
        return self._settled + self._tail

    def add(self, text: str) -> int:
        """Append ``text`` and return the running count in tokens."""
        if not text:
            return self.count
        cut = _last_safe(self._last, text)
        self._last = text[-1]
        if cut >= 0:
            self._settle(text, cut)
        else:
            self._pieces.append(text)
            self._length += len(text)
        if self._length <= _SMALL or self._length >= self._counted + self._counted // 8:
            self._recount()
        return self.count

    def total(self) -> int:
        """Return the exact count of the whole text."""
        if self._counted != self._length:
            self._recount()
        return self.count

    def _settle(self, text: str, cut: int) -> None:
        self._pieces.append(text[:cut])
        self._settled += count_text("".join(self._pieces), self.encoding)
        self._pieces = [text[cut:]]
        self._length = len(text) - cut
        self._counted = 0

    def _recount(self) -> None:
        if len(self._pieces) > 1:
            self._pieces = ["".join(self._pieces)]
        self._tail = count_text(self._pieces[0], self.encoding) if self._pieces else 0
        self._counted = self._length


def _last_safe(before: str, text: str) -> int:
    """Return the last index of ``text`` that no token can span, or -1 (``before``: the character before ``text``)."""
    cut = text.rfind(" ")
    while cut >= 0:
        ahead = text[cut - 1] if cut else before
        if ahead and not ahead.isspace():
            return cut
        cut = text.rfind(" ", 0, cut)
    last = -1
    for match in _SAFE.finditer(before + text, len(before)):
        last = match.start()
    return last - len(before) if last >= 0 else -1


class GenerationCounter:
    """Count a generation's output: one text for each kind (text, reasoning, arguments), choice and index."""

    __slots__ = ("_count", "_lanes", "encoding", "exact")

    def __init__(self, encoding: str, exact: bool) -> None:
        self.encoding = encoding
        self.exact = exact
        self._count = 0
        self._lanes: dict[tuple[str, int, int], TokenCounter] = {}

    @property
    def count(self) -> int:
        """The running count over all lanes, in tokens."""
        return self._count

    def add(self, kind: str, choice: int, index: int, text: str) -> int:
        """Append ``text`` to a lane and return the running count over all lanes, in tokens."""
        lane = self._lanes.get((kind, choice, index))
        if lane is None:
            lane = self._lanes[kind, choice, index] = TokenCounter(self.encoding, self.exact)
        before = lane.count
        self._count += lane.add(text) - before
        return self._count

    def total(self) -> int:
        """Return the exact count over all lanes, in tokens."""
        self._count = sum(lane.total() for lane in self._lanes.values())
        return self._count


def count_input(messages: list[Message], params: dict[str, Any], encoding: str) -> tuple[int, bool]:
    """Return the tokens of a chat request, and whether the accounting is exact.

    It is an estimate for elements whose rendering providers do not publish: tools, tool calls, response formats, and
    parts that are not text (their size is not in the count).
    """
    total, exact = _PRIMING, True
    for message in messages:
        total += _PER_MESSAGE + count_text(message.role, encoding)
        if message.name is not None:
            total += _PER_NAME + count_text(message.name, encoding)
        for part in _parts(message.content):
            content = part.get("text") if part.get("type") == "text" else None
            exact = exact and isinstance(content, str)
            total += count_text(content, encoding) if isinstance(content, str) else 0
        for text in (message.refusal, message.reasoning_content, message.reasoning, message.tool_plan):
            if text:
                exact = False
                total += count_text(text, encoding)
        if message.tool_calls:
            exact = False
            total += count_text(_json(message.tool_calls), encoding)
    for name in ("tools", "functions", "response_format"):
        if params.get(name):
            exact = False
            total += count_text(_json(params[name]), encoding)
    return total, exact


def _parts(content: str | list[dict[str, Any]] | None) -> list[dict[str, Any]]:
    if content is None:
        return []
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()
