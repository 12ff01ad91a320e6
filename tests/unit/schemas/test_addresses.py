"""Names, subjects, partitions and cursors."""

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas import subjects
from schemas.cursor import Cursor, CursorIssuer, InvalidCursor
from schemas.names import NAME_PATTERN, InvalidName, check_name
from schemas.subjects import Address, InvalidSubject, parse_address, partition_of, token_subject

NAMES = st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True)
BAD_NAMES = ["", "a" * 65, "a.b", "a b", "*", ">", "a>", "é", "a\n", "\n", "a/b", "a\x00", "٣", " a", "$JS"]
CREATED = "2025-11-03T09:14:07.123456789Z"


@given(NAMES)
def test_a_name_of_safe_characters_is_returned_as_it_is(name: str) -> None:
    assert check_name("session", name) is name


@pytest.mark.parametrize("name", [*BAD_NAMES, None, 7, b"a"])
def test_any_other_name_is_refused_and_named_with_its_role(name: Any) -> None:
    with pytest.raises(InvalidName, match=r"session name .* is not valid: use 1 to 64") as caught:
        check_name("session", name)
    assert (caught.value.role, caught.value.value) == ("session", name)
    assert len(str(caught.value)) < 250


@given(st.text(max_size=70))
def test_the_published_pattern_agrees_with_the_check(name: str) -> None:
    try:
        check_name("tenant", name)
    except InvalidName:
        # `$` of Python alone also matches before a last line end; in JSON Schema it does not.
        assert re.match(NAME_PATTERN, name) is None or name.endswith("\n")
    else:
        assert re.match(NAME_PATTERN, name)


@given(NAMES, NAMES, NAMES, st.integers(1, 256))
def test_an_address_round_trips_through_its_subject(
    tenant: str, session: str, generation: str, partitions: int
) -> None:
    address = Address.of(tenant, session, generation, partitions)
    subject = token_subject(address)
    assert parse_address(subject) == address
    assert parse_address("live" + subject.removeprefix("tokens")) == address


@pytest.mark.parametrize(
    "subject",
    [
        *("", "tokens", "tokens.0.a.b", "tokens.0.a.b.c.d", "requests.0.a.b.c", "tokens.x.a.b.c", "tokens..a.b.c"),
        *(
            "tokens.-1.a.b.c",
            "tokens.٣.a.b.c",
            "tokens.01.a.b.c",
            "tokens.0.a..c",
            "tokens.0.a.b.c\n",
            "tokens.0.*.b.c",
        ),
        *("tokens.0.a.b.>", f"tokens.0.a.b.{'c' * 65}", "TOKENS.0.a.b.c", "tokens.1234.a.b.c"),
    ],
)
def test_any_other_subject_is_refused(subject: str) -> None:
    with pytest.raises(InvalidSubject):
        parse_address(subject)


@pytest.mark.parametrize("bad", BAD_NAMES)
def test_no_bad_name_gets_into_a_subject(bad: str) -> None:
    builders = [
        lambda: Address.of(bad, "s", "g", 1),
        lambda: Address.of("t", bad, "g", 1),
        lambda: Address.of("t", "s", bad, 1),
        lambda: subjects.request_subject(bad, "g"),
        lambda: subjects.request_subject("p", bad),
        lambda: subjects.request_filter(bad),
        lambda: subjects.dead_subject(bad, "g"),
        lambda: subjects.dead_subject("p", bad),
    ]
    for build in (subjects.log_filter, subjects.live_filter):
        builders += [lambda b=build: b(0, bad, "s"), lambda b=build: b(0, "t", bad)]  # type: ignore[misc]
        if bad != "*":
            builders.append(lambda b=build: b(0, "t", "s", bad))  # type: ignore[misc]
    for build in (subjects.control_subject, subjects.presence_subject, subjects.generation_key):
        builders += [
            lambda b=build: b(bad, "s", "g"),
            lambda b=build: b("t", bad, "g"),
            lambda b=build: b("t", "s", bad),
        ]  # type: ignore[misc]
    for builder in builders:
        with pytest.raises(InvalidName):
            builder()


def test_subjects_match_the_protocol() -> None:
    address = Address.of("default", "chat-1", "gen_1", 1)
    assert token_subject(address) == "tokens.0.default.chat-1.gen_1"
    assert subjects.log_filter(0, "default", "chat-1") == "tokens.0.default.chat-1.*"
    assert subjects.live_filter(3, "default", "chat-1", "gen_1") == "live.3.default.chat-1.gen_1"
    assert subjects.request_subject("default", "gen_1") == "requests.default.gen_1"
    assert subjects.request_filter("default") == "requests.default.*"
    assert subjects.control_subject("default", "chat-1", "gen_1") == "control.default.chat-1.gen_1"
    assert subjects.presence_subject("default", "chat-1", "gen_1") == "presence.default.chat-1.gen_1"
    assert subjects.generation_key("default", "chat-1", "gen_1") == "default.chat-1.gen_1"


@pytest.mark.parametrize(
    ("tenant", "session", "partitions", "partition"),
    [
        ("default", "chat-1", 1, 0),
        ("default", "chat-1", 8, 4),
        ("default", "chat-2", 8, 0),
        ("acme", "chat-1", 256, 113),
    ],
)
def test_partitions_never_move(tenant: str, session: str, partitions: int, partition: int) -> None:
    assert partition_of(tenant, session, partitions) == partition


def test_partitions_are_used_evenly() -> None:
    counts = [0] * 8
    for number in range(4_000):
        counts[partition_of("default", f"session-{number}", 8)] += 1
    assert min(counts) > 400


def test_cursors_are_pinned() -> None:
    assert CursorIssuer(0, CREATED, "default", "chat-1").issue(1_000) == "t100b124d23f7f5bc5460000000003e8"


@given(st.integers(0, 255), NAMES, NAMES, st.integers(0, 2**48 - 1))
def test_a_cursor_round_trips_through_its_text(partition: int, tenant: str, session: str, seq: int) -> None:
    issuer = CursorIssuer(partition, CREATED, tenant, session)
    text = issuer.issue(seq)
    assert Cursor.parse(text) == Cursor(partition, issuer.incarnation, issuer.session, seq)
    assert re.fullmatch(r"[A-Za-z0-9]+", text), "it stands in a URL or header as it is"


@given(st.integers(0, 2**48 - 1), st.integers(0, 2**48 - 1))
def test_cursors_sort_as_text_in_the_order_of_the_log(one: int, other: int) -> None:
    issuer = CursorIssuer(0, CREATED, "default", "chat-1")
    assert (issuer.issue(one) < issuer.issue(other)) == (one < other)


@pytest.mark.parametrize("other", [("default", "chat-2"), ("acme", "chat-1")])
def test_a_cursor_of_another_session_or_tenant_has_another_session_hash(other: tuple[str, str]) -> None:
    mine = CursorIssuer(0, CREATED, "default", "chat-1")
    theirs = Cursor.parse(CursorIssuer(0, CREATED, *other).issue(5))
    assert theirs.session != mine.session


def test_a_cursor_of_a_recreated_stream_has_another_incarnation() -> None:
    before = CursorIssuer(0, CREATED, "default", "chat-1")
    after = CursorIssuer(0, "2025-11-03T09:14:07.123456788Z", "default", "chat-1")
    cursor = Cursor.parse(before.issue(5))
    assert cursor.incarnation == before.incarnation != after.incarnation
    assert cursor.session == after.session


@given(st.text(max_size=60))
def test_garbage_is_no_cursor(text: str) -> None:
    with pytest.raises(InvalidCursor):
        Cursor.parse(text)


@pytest.mark.parametrize(
    "change", [str.upper, lambda c: c + "0", lambda c: c[:-1], lambda c: c + "\n", lambda c: " " + c]
)
def test_a_cursor_that_was_changed_is_none(change: Any) -> None:
    with pytest.raises(InvalidCursor):
        Cursor.parse(change(CursorIssuer(0, CREATED, "default", "chat-1").issue(0xABC)))


@pytest.mark.parametrize("partition", [-1, 256])
def test_a_partition_that_does_not_fit_into_a_cursor_is_refused(partition: int) -> None:
    with pytest.raises(ValueError, match="use 0 to 255"):
        CursorIssuer(partition, CREATED, "default", "chat-1")
