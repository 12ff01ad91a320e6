"""The text that the provider sends and the clients expect: natural words, different for each stream."""

import re
from functools import cache
from itertools import accumulate
from typing import Final

__all__ = ["boundaries", "token", "tokens", "word_index", "words"]

PASSAGE: Final = """
 A mill needs two channels. The first brings the water down from the pond to the wheel, and everybody who visits the
 mill looks at it, because that is where the noise is. The second carries the water away again; it is called the
 tailrace, and nobody looks at it until it is blocked. Then the water rises behind the wheel, the paddles drag through
 it, and the stones turn slower and slower although there is more water in the mill than ever before. Old millers knew
 this well. "Build the tailrace wider than you think," one of them wrote, "for the river will not wait until you have
 finished digging." He had seen three wheels torn from their axles in a single spring, each of them because what came
 in could not go out. So he measured: in March he counted 1,240 buckets an hour, in August barely 75. He drew a table,
 and beside each number he noted the weather, the grain, and which of his sons had been asleep. The widest channel cost
 him 38 days and a good spade, and it never filled again. Visitors from Genève and Köln came to see it «c'est large !»,
 said one, and went home with wet shoes. What is true of water is true of words as well: whoever produces them
 quickly must think of those who read slowly, of those who arrive late, of those who leave in the middle of a sentence
 and come back for the rest. None of them should have to ask twice, and none of them should keep the others waiting. ☕
"""


@cache
def words() -> tuple[str, ...]:
    """Return the passage split into pieces of the usual length of a language model's tokens."""
    return tuple(re.findall(r" ?[^ ]{1,7}", " ".join(PASSAGE.split())))


def word_index(stream: int, index: int) -> int:
    """Return the word index of token ``index`` (1, 2 …) of a stream; streams start at different words."""
    return (stream * 31 + index) % len(words())


def token(stream: int, index: int) -> str:
    """Return one token. The first contains the stream's number, so that a misdelivered answer is detected."""
    return words()[word_index(stream, index)] if index else f"[{stream}]"


def tokens(stream: int, count: int) -> list[str]:
    """Return the first ``count`` tokens of a stream."""
    return [token(stream, index) for index in range(count)]


def boundaries(pieces: list[str]) -> list[int]:
    """Return for each token the number of characters up to its end, after which the token has arrived."""
    return list(accumulate(map(len, pieces)))
