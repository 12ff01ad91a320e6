"""API keys, tickets and patterns of sessions, without a broker."""

import hashlib
import time

import jwt
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.kit.auth.api_keys import KeyRecord, admin_record, matches, mint, parse
from services.kit.auth.config import needs_credentials
from services.kit.auth.jwt_verifier import CredentialRefused
from services.kit.auth.principal import PRINCIPAL, SCOPES, Principal, authorize, principal_of, session_patterns
from services.kit.auth.tickets import issue_ticket, read_ticket
from services.kit.problem import Problem
from services.kit.settings import SettingsError, Shared
from services.kit.telemetry import scrub

SECRET = b"s" * 32


def record(hash_: str, **fields: object) -> KeyRecord:
    return msgspec.convert({"id": "abcd", "tenant": "acme", "hash": hash_, "scopes": ["read"]} | fields, KeyRecord)


def test_a_minted_key_is_matched_by_its_hash_alone() -> None:
    id_, text, hash_ = mint()
    assert text.startswith(f"tr_{id_}_")
    found = parse(text)
    assert found is not None
    assert matches(record(hash_), found[1])
    assert not matches(record(hash_), found[1][:-1] + ("A" if found[1][-1] != "A" else "B"))
    assert not matches(record(hashlib.sha256(b"").hexdigest()), found[1])
    assert found[1] not in hash_


def test_no_two_keys_are_alike() -> None:
    assert len({mint().text for _ in range(200)}) == 200


@pytest.mark.parametrize("text", ["", "tr_", "tr_abcd_", "tr_abcd_short", "tr_ABCD_" + "x" * 43, "tr_a.b_" + "x" * 43])
def test_text_of_another_form_is_no_key(text: str) -> None:
    assert parse(text) is None


def test_a_key_with_a_trailing_newline_is_no_key() -> None:
    assert parse(mint().text + "\n") is None


def test_the_secret_of_a_key_is_scrubbed_from_logs() -> None:
    text = mint().text
    assert text.split("_", 2)[2] not in scrub(f"refused {text} at the door")


def test_the_operator_key_is_verified_by_its_hash() -> None:
    id_, text, hash_ = mint()
    admin = admin_record(f"{id_}.{hash_}", "default")
    assert admin.operator
    assert admin.principal().scopes == SCOPES
    parsed = parse(text)
    assert parsed is not None
    assert matches(admin, parsed[1])
    for wrong in (text, f"{id_}:{hash_}", f"{id_}.{hash_[:-1]}", hash_):
        with pytest.raises(ValueError, match="bootstrap"):
            admin_record(wrong, "default")


@given(st.text(alphabet="abc-_*", min_size=1, max_size=12), st.text(alphabet="abc-_", min_size=1, max_size=12))
def test_a_session_pattern_matches_literally_except_stars(pattern: str, session: str) -> None:
    principal = Principal(tenant="t", sessions=session_patterns([pattern]))
    assert principal.reaches(session) == _matches(pattern, session)


def _matches(pattern: str, text: str) -> bool:
    """Whether a pattern fits, by going through both."""
    if not pattern:
        return not text
    if pattern[0] == "*":
        return any(_matches(pattern[1:], text[n:]) for n in range(len(text) + 1))
    return bool(text) and text[0] == pattern[0] and _matches(pattern[1:], text[1:])


@pytest.mark.parametrize("patterns", [[], [""], ["a b"], ["a?"], ["[a]"], ["a\n"], ["é"], ["x" * 65], ["a"] * 0])
def test_other_patterns_are_refused(patterns: list[str]) -> None:
    with pytest.raises(ValueError, match="patterns"):
        session_patterns(patterns)


def test_a_missing_scope_is_403_and_a_session_out_of_reach_404() -> None:
    principal = Principal(tenant="t", scopes=frozenset({"read"}), sessions=("a-*",))
    assert authorize(principal, "read", "a-1") is principal
    with pytest.raises(Problem) as refused:
        authorize(principal, "start", "a-1")
    assert refused.value.status == 403
    with pytest.raises(Problem) as refused:
        authorize(principal, "read", "b-1")
    assert refused.value.status == 404


def test_principal_of_raises_without_a_principal() -> None:
    with pytest.raises(Problem) as refused:
        principal_of({})
    assert refused.value.status == 401
    assert "WWW-Authenticate" in refused.value.headers
    problem = Problem(503, "not now")
    with pytest.raises(Problem) as refused:
        principal_of({PRINCIPAL: problem})
    assert refused.value is problem


PARENT = Principal(tenant="acme", key="tr_abcd", scopes=frozenset({"read", "start"}), expires_at=4_000_000_000.0)


def ticket(expires_at: float | None = None) -> str:
    until = time.time() + 60 if expires_at is None else expires_at
    return issue_ticket(SECRET, PARENT, ("chat",), frozenset({"read"}), until)


def test_a_ticket_has_the_narrowed_rights_of_its_parent() -> None:
    found = read_ticket(SECRET, ticket())
    assert (found.tenant, found.key) == ("acme", "tr_abcd")
    assert found.scopes == {"read"}
    assert found.sessions == ("chat",)
    assert found.expires_at == PARENT.expires_at
    assert not found.operator


def test_a_ticket_is_valid_for_a_short_time() -> None:
    with pytest.raises(CredentialRefused) as refused:
        read_ticket(SECRET, ticket(time.time() - 10))
    assert refused.value.reason == "ticket_expired"


def test_a_ticket_of_another_secret_or_another_kind_of_token_is_refused() -> None:
    claims = {"exp": time.time() + 60, "aud": "tailrace", "tenant": "acme", "key": "x", "scopes": [], "sessions": ["*"]}
    others = [
        issue_ticket(b"t" * 32, PARENT, ("chat",), frozenset({"read"}), time.time() + 60),
        jwt.encode(claims, SECRET, algorithm="HS256"),
        jwt.encode(claims | {"aud": "urn:tailrace:ticket", "scopes": ["admin"]}, SECRET, algorithm="HS256"),
        jwt.encode(claims | {"aud": "urn:tailrace:ticket", "sessions": []}, SECRET, algorithm="HS256"),
        jwt.encode(claims | {"aud": "urn:tailrace:ticket"}, "", algorithm="none"),
        ticket() + "x",
        "",
        "a.b.c",
        "x" * 10_000,
    ]
    for other in others:
        with pytest.raises(CredentialRefused):
            read_ticket(SECRET, other)


HASH = f"abcd.{'0' * 64}"


@pytest.mark.parametrize(
    ("shared", "host", "expected"),
    [
        (Shared(), "127.0.0.1", False),
        (Shared(), "localhost", False),
        (Shared(), "::1", False),
        (Shared(), "127.8.8.8", False),
        (Shared(admin_key_hash=HASH), "127.0.0.1", True),
        (Shared(admin_key_hash=HASH), "0.0.0.0", True),
        (Shared(jwt_secret_file="f"), "0.0.0.0", True),
        (Shared(auth="required"), "127.0.0.1", True),
        (Shared(auth="insecure"), "0.0.0.0", False),
        (Shared(published="127.0.0.1"), "0.0.0.0", False),
    ],
)
def test_credentials_are_required_on_public_addresses(shared: Shared, host: str, expected: bool) -> None:
    assert needs_credentials(shared, host) is expected


@pytest.mark.parametrize(
    ("shared", "host"),
    [
        (Shared(), "0.0.0.0"),
        (Shared(), "::"),
        (Shared(), "192.168.1.5"),
        (Shared(), "127.evil.test"),
        (Shared(), "localhost.evil.test"),
        (Shared(published="0.0.0.0"), "127.0.0.1"),
    ],
)
def test_a_public_address_without_an_admin_key_is_a_settings_error(shared: Shared, host: str) -> None:
    with pytest.raises(SettingsError, match="keys bootstrap"):
        needs_credentials(shared, host)
