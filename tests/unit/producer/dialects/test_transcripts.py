"""Test that every recorded answer has the same parts under every chunking."""

from itertools import pairwise

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.producer.core.parts import Alive, End, Text, UpstreamFailure, UsagePart
from tests.support.provider_transcripts import TRANSCRIPTS, Transcript, described
from tests.support.provider_transcripts import read as fed

ALL = pytest.mark.parametrize("transcript", TRANSCRIPTS, ids=str)


def test_every_dialect_has_transcripts() -> None:
    assert {t.dialect for t in TRANSCRIPTS} == {"openai", "openrouter", "anthropic", "cohere"}
    assert len(TRANSCRIPTS) >= 35


@ALL
def test_read_at_once(transcript: Transcript) -> None:
    assert described(fed(transcript.parser(), [transcript.wire])) == transcript.expected


@ALL
def test_read_byte_by_byte(transcript: Transcript) -> None:
    wire = transcript.wire
    assert described(fed(transcript.parser(), [wire[i : i + 1] for i in range(len(wire))])) == transcript.expected


@ALL
def test_split_in_two_at_every_byte(transcript: Transcript) -> None:
    wire, expected = transcript.wire, transcript.expected
    for at in range(1, len(wire)):
        assert described(fed(transcript.parser(), [wire[:at], wire[at:]])) == expected, at


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_split_anywhere_any_number_of_times(data: st.DataObject) -> None:
    transcript = data.draw(st.sampled_from(TRANSCRIPTS))
    wire = transcript.wire
    cuts = sorted(data.draw(st.sets(st.integers(0, len(wire)), max_size=40)))
    chunks = [wire[a:b] for a, b in zip([0, *cuts], [*cuts, len(wire)], strict=True)]
    assert described(fed(transcript.parser(), chunks)) == transcript.expected


@ALL
def test_line_ends_do_not_matter(transcript: Transcript) -> None:
    lines = transcript.wire.replace(b"\r\n", b"\n")
    for line_end in (b"\r\n", b"\r", b"\n"):
        wire = b"\xef\xbb\xbf" + lines.replace(b"\n", line_end)
        assert described(fed(transcript.parser(), [wire])) == transcript.expected
        assert described(fed(transcript.parser(), [wire[i : i + 1] for i in range(len(wire))])) == transcript.expected


@ALL
def test_nothing_follows_the_end_or_a_failure(transcript: Transcript) -> None:
    parser = transcript.parser()
    parts = parser.feed(transcript.wire)
    endings = [i for i, part in enumerate(parts) if isinstance(part, End | UpstreamFailure)]
    if transcript.case == "cut-off":
        assert endings == []
        assert isinstance(parser.finish()[-1], UpstreamFailure)
    else:
        assert endings == [len(parts) - 1]
    assert parser.feed(transcript.wire) == []
    assert parser.finish() == []


@ALL
def test_one_read_joins_adjacent_text_of_one_choice(transcript: Transcript) -> None:
    parts = transcript.parser().feed(transcript.wire)
    for before, after in pairwise(parts):
        assert not (isinstance(before, Text) and isinstance(after, Text) and before.choice == after.choice)


@pytest.mark.parametrize("name", ["openai-comments", "openrouter-text", "anthropic-text"])
def test_comments_and_pings_are_keep_alives(name: str) -> None:
    transcript = next(t for t in TRANSCRIPTS if str(t) == name)
    assert Alive() in transcript.parser().feed(transcript.wire)


@pytest.mark.parametrize("dialect", ["openai", "anthropic", "cohere"])
@pytest.mark.parametrize(
    "payload",
    [b"{", b"[]", b"17", b'"text"', b'{"type": 3, "choices": 3}', b'{"id": "\xff', b"[" * 100_000, b"<html>"],
    ids=["truncated", "list", "number", "text", "wrong-types", "not-utf8", "too-deep", "html"],
)
def test_a_payload_of_another_dialect_ends_as_malformed(dialect: str, payload: bytes) -> None:
    parser = Transcript(dialect, "text").parser()
    parts = parser.feed(b"data: " + payload + b"\n\n")
    assert [type(p) for p in parts] == [UpstreamFailure]
    failure = parts[0]
    assert isinstance(failure, UpstreamFailure)
    assert failure.code == "upstream_malformed"
    assert len(failure.message) <= 500


@pytest.mark.parametrize("dialect", ["openai", "openrouter", "anthropic", "cohere"])
@settings(max_examples=150, deadline=None)
@given(noise=st.binary(max_size=300))
def test_no_bytes_raise(dialect: str, noise: bytes) -> None:
    parser = Transcript(dialect, "text").parser()
    parts = [*parser.feed(noise), *parser.feed(b"\n\ndata: " + noise + b"\n\n"), *parser.finish()]
    assert isinstance(parts[-1], End | UpstreamFailure)
    for part in parts:
        assert msgspec.json.encode(part)


@pytest.mark.parametrize("cost", ["1e999999999", "-1e999999999", "1e-999999999"])
def test_an_absurd_cost_is_no_cost(cost: str) -> None:
    parser = Transcript("openrouter", "text").parser()
    parts = parser.feed(b'data: {"usage": {"prompt_tokens": 1, "cost": %s}}\n\n' % cost.encode())
    assert not any(isinstance(part, UsagePart) and part.usage.cost for part in parts)
    assert sum(len(msgspec.json.encode(part)) for part in parts) < 1000
