"""Circuit breakers of one process, and of several that share a broker."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import REGISTRY

from services.kit.jetstream.broker import Broker
from services.producer.adapters import circuits as module
from services.producer.adapters.circuits import COUNTED, Circuits, Permit
from services.producer.core.circuit import Circuit
from services.producer.core.parts import UpstreamFailure
from tests.conftest import eventually

DOWN = UpstreamFailure("upstream_overloaded", "busy", recoverable=True)
NOBODY = UpstreamFailure("upstream_unreachable", "nobody there", recoverable=True)
FOR_EVER = 1_000.0


def shown(provider: str, name: str = "circuit_state") -> float | None:
    return REGISTRY.get_sample_value(f"tailrace_producer_{name}", {"provider": provider})


def admitted(circuits: Circuits, provider: str = "p", model: str = "m", tenant: str = "t") -> Permit:
    permit = circuits.admit(provider, model, tenant)
    assert permit is not None
    return permit


def opened(circuits: Circuits, provider: str = "p", model: str = "m", tenant: str = "t", failures: int = 3) -> None:
    for _ in range(failures):
        admitted(circuits, provider, model, tenant).failed(DOWN, connected=True)


async def tried(circuits: Circuits, provider: str = "p", model: str = "m", tenant: str = "t") -> Permit:
    permit: Permit = await eventually(lambda: circuits.admit(provider, model, tenant))
    return permit


@asynccontextmanager
async def following(circuits: Circuits) -> AsyncIterator[Circuits]:
    task = asyncio.create_task(circuits.follow())
    try:
        yield circuits
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_circuit_opens_after_the_threshold_of_consecutive_failures(broker: Broker) -> None:
    circuits = Circuits(broker, 3, FOR_EVER)
    opened(circuits, failures=2)
    admitted(circuits).succeeded()
    opened(circuits, failures=2)
    admitted(circuits).failed(DOWN, connected=True)
    assert circuits.admit("p", "m", "t") is None
    assert shown("p", "model_circuits_open") == 1


async def test_circuits_of_models_and_upstreams_are_independent(broker: Broker) -> None:
    circuits = Circuits(broker, 3, FOR_EVER)
    opened(circuits, "p", "m")
    assert circuits.admit("p", "m", "t") is None
    admitted(circuits, "p", "other")
    admitted(circuits, "q", "m")
    assert shown("p") == 0


async def test_connection_failures_open_the_circuit_of_the_whole_provider(broker: Broker) -> None:
    circuits = Circuits(broker, 3, FOR_EVER)
    for number in range(3):
        admitted(circuits, "gone", f"m{number}", f"t{number}").failed(NOBODY, connected=False)
    assert circuits.admit("gone", "another", "t9") is None
    assert circuits.is_open("gone", "another", "t9")
    assert shown("gone") == 2
    assert shown("gone", "model_circuits_open") == 0


async def test_any_response_resets_the_count_of_connection_failures(broker: Broker) -> None:
    circuits = Circuits(broker, 2, FOR_EVER)
    admitted(circuits, "gone").failed(NOBODY, connected=False)
    admitted(circuits, "gone").connected()
    admitted(circuits, "gone").failed(NOBODY, connected=False)
    admitted(circuits, "gone")


@pytest.mark.parametrize(
    "code",
    [
        "upstream_rate_limited",
        "upstream_unauthorized",
        "upstream_not_found",
        "upstream_bad_request",
        "upstream_malformed",
        "context_length_exceeded",
        "content_filtered",
    ],
)
async def test_failures_caused_by_the_request_do_not_open_the_circuit(broker: Broker, code: str) -> None:
    circuits = Circuits(broker, 1, FOR_EVER)
    assert code not in COUNTED
    admitted(circuits).failed(UpstreamFailure(code, "no"), connected=True)
    admitted(circuits)


async def test_failures_of_one_tenant_open_the_circuit_for_that_tenant_alone(broker: Broker) -> None:
    circuits = Circuits(broker, 3, FOR_EVER)
    opened(circuits, tenant="loud", failures=3)
    assert circuits.admit("p", "m", "loud") is None
    calls = [admitted(circuits, tenant="quiet") for _ in range(5)]
    for call in calls:
        call.succeeded()
    admitted(circuits, tenant="loud")


async def test_failures_of_two_tenants_open_the_circuit_for_all_tenants(broker: Broker) -> None:
    circuits = Circuits(broker, 3, FOR_EVER)
    opened(circuits, tenant="loud", failures=3)
    admitted(circuits, tenant="quiet").failed(DOWN, connected=True)
    for tenant in ("loud", "quiet", "third"):
        assert circuits.admit("p", "m", tenant) is None


async def test_repeatedly_failing_trials_of_one_tenant_block_no_other_tenant(broker: Broker) -> None:
    circuits = Circuits(broker, 2, 0.05)
    opened(circuits, tenant="loud", failures=1)
    opened(circuits, tenant="quiet", failures=1)
    assert circuits.admit("p", "m", "third") is None
    for _ in range(3):
        (await tried(circuits, tenant="loud")).failed(DOWN, connected=True)
        admitted(circuits, tenant="third").left()
    admitted(circuits, tenant="third").succeeded()
    admitted(circuits, tenant="loud")


async def test_half_open_lets_one_call_through_and_closes_on_its_success(broker: Broker) -> None:
    circuits = Circuits(broker, 3, 0.05)
    opened(circuits)
    trial = await tried(circuits)
    assert circuits.admit("p", "m", "t") is None
    trial.succeeded()
    admitted(circuits)
    admitted(circuits)
    assert shown("p", "model_circuits_open") == 0


async def test_half_open_opens_again_on_the_first_failure(broker: Broker) -> None:
    circuits = Circuits(broker, 3, 0.05)
    opened(circuits)
    (await tried(circuits)).failed(DOWN, connected=True)
    assert circuits.is_open("p", "m", "t")
    await tried(circuits)


async def test_only_an_abandoned_trial_allows_another_trial(broker: Broker) -> None:
    circuits = Circuits(broker, 3, 0.05)
    earlier = admitted(circuits)
    opened(circuits)
    trial = await tried(circuits)
    earlier.left()
    assert circuits.admit("p", "m", "t") is None
    trial.left()
    admitted(circuits)


async def test_is_open_reports_an_open_circuit_without_admission(broker: Broker) -> None:
    circuits = Circuits(broker, 3, 0.05)
    assert not circuits.is_open("p", "m", "t")
    opened(circuits)
    assert circuits.is_open("p", "m", "t")
    await eventually(lambda: not circuits.is_open("p", "m", "t"))
    admitted(circuits)


@pytest.mark.parametrize(("provider", "model"), [("p", "m"), ("my.own_provider-2", "org/a model: *>.ü")])
async def test_a_circuit_opened_by_one_producer_opens_for_all(broker: Broker, provider: str, model: str) -> None:
    one, other = Circuits(broker, 3, FOR_EVER), Circuits(broker, 3, FOR_EVER)
    async with following(other):
        opened(one, provider, model)
        await eventually(lambda: other.is_open(provider, model, "t"))
        assert other.admit(provider, model, "t") is None
        admitted(other, provider, model, "someone else")


async def test_a_producer_started_later_learns_open_circuits(broker: Broker) -> None:
    one, other = Circuits(broker, 3, FOR_EVER), Circuits(broker, 3, FOR_EVER)
    opened(one)
    for _ in range(3):
        admitted(one, "gone").failed(NOBODY, connected=False)
    async with following(other):
        await eventually(lambda: other.is_open("p", "m", "t") and other.is_open("gone", "any", "t"))


async def test_a_recovery_is_shared_as_well(broker: Broker) -> None:
    one, other = Circuits(broker, 3, 0.3), Circuits(broker, 3, 0.3)
    async with following(one), following(other):
        opened(one)
        await eventually(lambda: other.is_open("p", "m", "t"))
        (await tried(one)).succeeded()
        await eventually(lambda: not other._circuits)
        admitted(other)
        admitted(other)


async def test_circuits_of_unknown_model_names_are_bounded(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT", 10)
    circuits = Circuits(broker, 1, FOR_EVER)
    refused = UpstreamFailure("upstream_not_found", "no such model")
    for number in range(100):
        admitted(circuits, model=f"made-up-{number}").failed(refused, connected=True)
    assert not circuits._circuits
    for number in range(100):
        admitted(circuits, model=f"made-up-{number}").failed(DOWN, connected=True)
    assert len(circuits._circuits) == 10
    assert circuits.is_open("p", "made-up-99", "t")
    await asyncio.gather(*circuits._tasks)
    bucket = await broker.js.key_value(module.REGISTRY_BUCKET)
    assert len([key for key in await bucket.keys() if key.startswith("circuit.")]) <= module.SLOTS


_calls = st.lists(
    st.tuples(st.sampled_from("ab"), st.sampled_from(["fail", "leave", "succeed"]), st.floats(0, 30)), max_size=60
)


@given(st.integers(1, 4), _calls)
def test_a_tenant_is_blocked_only_by_its_own_failures(threshold: int, calls: list[tuple[str, str, float]]) -> None:
    circuit, now, failed = Circuit(threshold, 15.0), 0.0, -100.0
    for tenant, outcome, pause in calls:
        now += pause
        call = object()
        if not circuit.admits(tenant, now, call):
            # Nothing else is under way here, so only a failure of its own can be why, a short time before or after
            # those of the other tenant.
            assert tenant == "a" or now - failed < 2 * 15.0
            continue
        if outcome == "fail":
            circuit.fail(tenant, now, call)
            failed = now if tenant == "b" else failed
        elif outcome == "succeed":
            circuit.succeed()
        else:
            circuit.leave(call)
        assert len(circuit.blocked) <= 8
