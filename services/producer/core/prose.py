"""English prose about any topic, made from sentence patterns: the text of the scripted provider."""

import random
import re
from collections.abc import Iterator
from typing import Final

from schemas.requests import Message

__all__ = ["pieces", "sentences", "topic_of"]

_OPENINGS: Final = (
    "Here is a short story about “{topic}”. ",
    "Let me tell you what I know about “{topic}”. ",
    "There is more to “{topic}” than one would think. ",
)
_PATTERNS: Final = (
    "In a {adjective} town by the {place}, {person} had been thinking about “{topic}” for years. ",
    "Every {time}, {person} would walk to the {place} and {verb} until the light was gone. ",
    "“{saying},” said {person}, and nobody at the {place} could think of an answer. ",
    "It was a {adjective} {time}, the kind on which even {person} had to {verb}. ",
    "The {place} was {adjective}, and the water ran past it as it always had. ",
    "What {person} did not know was that the {place} had its own memory of “{topic}”. ",
    "So they began to {verb}, slowly at first, and then as if they had never done anything else. ",
    "By the next {time}, word of it had reached the {place}, where {person} wrote it all down. ",
    "Some called it {adjective}; others only looked at the {place} and said nothing. ",
    "There were three rules: listen, {verb}, and never leave the {place} before the end of the {time}. ",
)
_WORDS: Final = {
    "adjective": ("quiet", "bright", "strange", "patient", "narrow", "golden", "half-forgotten", "windy", "gentle"),
    "place": ("river", "harbour", "old mill", "library", "railway bridge", "market", "lighthouse", "garden", "café"),
    "person": ("Mara", "the ferryman", "her brother", "an engineer from the north", "old Tomas", "the teacher", "Zoë"),
    "time": ("morning", "evening", "winter", "summer night", "Sunday", "autumn", "rainy afternoon"),
    "verb": ("count the boats", "read aloud", "begin again", "measure the current", "sing", "wait", "mend the nets"),
    "saying": (
        "A stream never says the same thing twice",
        "You only notice the water when it stops",
        "What is written down can be found again",
        "Nothing that flows is ever quite lost",
    ),
}
_PARAGRAPH: Final = 5
_TOPIC_LIMIT: Final = 60


def topic_of(messages: list[Message]) -> str:
    """Return the topic of the last user message: its first line, shortened."""
    for message in reversed(messages):
        if message.role != "user":
            continue
        content = message.content
        if isinstance(content, list):
            content = " ".join(str(part.get("text") or "") for part in content)
        words = re.sub(r"\s+", " ", content or "").strip(" .?!…")
        if words:
            return words if len(words) <= _TOPIC_LIMIT else words[:_TOPIC_LIMIT].rsplit(" ", 1)[0] + "…"
    return "a river that remembers"


def sentences(topic: str, rng: random.Random) -> Iterator[str]:
    """Yield sentences for ever, a blank line after every fifth."""
    yield rng.choice(_OPENINGS).replace("{topic}", topic)
    count = 1
    previous = ""
    while True:
        pattern = rng.choice([p for p in _PATTERNS if p != previous])
        previous = pattern
        chosen = {name: rng.choice(words) for name, words in _WORDS.items()}
        # The topic is text of a user: braces in it must stay as they are.
        sentence = pattern.replace("{topic}", "\0").format(**chosen).replace("\0", topic)
        sentence = sentence[0].upper() + sentence[1:]
        count += 1
        yield sentence.rstrip() + "\n\n" if count % _PARAGRAPH == 0 else sentence


def pieces(text: str) -> list[str]:
    """Split ``text`` approximately like a tokenizer: before words, and at punctuation."""
    return re.findall(r"\s*\w+|\s*[^\w\s]+|\s+$", text)
