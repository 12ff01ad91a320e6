"""Test least privilege on NATS, over TLS: each service works with its own user and is refused other subjects."""

import asyncio
import json
import os
import shutil
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import nats
import nats.errors
import pytest
import trustme

from bench.processes import free_port
from schemas.permissions import USERS
from services.kit.jetstream.broker import Broker, BrokerUnavailable
from services.kit.settings import SettingsError, Shared
from services.kit.tls import client_tls
from services.producer.adapters.circuits import Circuits
from services.producer.core.parts import UpstreamFailure
from tests.conftest import eventually, nats_server_path
from tests.support.service_processes import REPOSITORY, clean_environment, service

PASSWORDS = {user: f"{user}-secret" for user in USERS}


class Guarded:
    """A nats-server with the services' users that requires client certificates."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.log = folder / "nats.log"
        ca, stranger = trustme.CA(), trustme.CA()
        ca.cert_pem.write_to_path(str(folder / "ca.pem"))
        stranger.cert_pem.write_to_path(str(folder / "stranger.pem"))
        for name in ("127.0.0.1", "client.test"):
            issued = ca.issue_cert(name)
            issued.private_key_pem.write_to_path(str(folder / f"{name}.key"))
            with (folder / f"{name}.pem").open("wb") as chain:
                for blob in issued.cert_chain_pems:
                    chain.write(blob.bytes())
        (folder / "users.conf").write_text(tailrace("topology", "users"))
        (folder / "server.conf").write_text(
            f'listen: "127.0.0.1:{self.port}"\n'
            f'jetstream {{ store_dir: "{folder / "js"}" }}\n'
            f'tls {{ cert_file: "{folder / "127.0.0.1.pem"}", key_file: "{folder / "127.0.0.1.key"}"\n'
            f'  ca_file: "{folder / "ca.pem"}", verify: true }}\n'
            "include users.conf\n"
        )
        env = os.environ | {f"NATS_{user.upper()}_PASSWORD": word for user, word in PASSWORDS.items()}
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [nats_server_path(), "-c", str(folder / "server.conf")], env=env, stdout=output, stderr=output
            )
        deadline = time.monotonic() + 10
        while "Server is ready" not in self.log.read_text():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)

    def url(self, user: str) -> str:
        return f"tls://{user}:{PASSWORDS[user]}@127.0.0.1:{self.port}"

    def env(self, user: str) -> dict[str, str]:
        return clean_environment(
            TAILRACE_NATS_URL=self.url(user),
            TAILRACE_NATS_CA=str(self.folder / "ca.pem"),
            TAILRACE_NATS_CERT=str(self.folder / "client.test.pem"),
            TAILRACE_NATS_KEY=str(self.folder / "client.test.key"),
            TAILRACE_MANAGE_STREAMS="false",
            TAILRACE_DATA=str(self.folder / "data"),
        )

    @property
    def tls(self) -> ssl.SSLContext | None:
        files = (self.folder / "ca.pem", self.folder / "client.test.pem", self.folder / "client.test.key")
        return client_tls(*map(str, files))

    def violations(self) -> list[str]:
        return [line for line in self.log.read_text().splitlines() if "Violation" in line]

    def stop(self) -> None:
        self.process.kill()
        self.process.wait(10)


def tailrace(*argv: str, env: dict[str, str] | None = None) -> str:
    command = [sys.executable, "-m", "services.standalone.cli", *argv]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=env or clean_environment(), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    folder = tmp_path_factory.mktemp("guarded")
    server = Guarded(folder)
    try:
        assert "TOKENS_0, REQUESTS" in tailrace("topology", "apply", env=server.env("setup"))
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)


def question(**changes: object) -> dict[str, object]:
    return {
        "model": "scripted/story",
        "messages": [{"role": "user", "content": "rivers"}],
        "params": {"tokens": 30, "tokens_per_second": 300},
    } | changes


async def test_the_services_work_from_end_to_end_with_their_own_users(guarded: Guarded, tmp_path: Path) -> None:
    with ExitStack() as stack, httpx.Client(timeout=20) as http:
        urls = {
            name: stack.enter_context(service(name, free_port(), guarded.env(name), tmp_path))
            for name in ("producer", "billing", "delivery")
        }
        generations = f"{urls['delivery']}/v1/sessions/s/generations"
        asked = [
            http.post(generations, json=question()),
            http.post(generations, json=question(priority="batch")),
            http.post(generations, json=question(model="scripted/refuse")),
            http.post(generations, json=question(params={"tokens": 100_000})),
            http.post(generations, json=question(params={"tokens": 100_000}, on_disconnect={"cancel_after": 0})),
        ]
        assert [answer.status_code for answer in asked] == [202] * 5, [answer.text for answer in asked]
        names = [answer.json()["generation"] for answer in asked]

        def state(name: str) -> str:
            return str(http.get(f"{generations}/{name}").json()["state"])

        await eventually(lambda: state(names[3]) == "running", timeout=20)
        assert http.post(f"{generations}/{names[3]}/cancel").status_code == 202
        wanted = ["completed", "completed", "failed", "cancelled", "cancelled"]
        await eventually(lambda: [state(name) for name in names] == wanted, timeout=30)
        with http.stream("GET", f"{urls['delivery']}/v1/sessions/s/events?generation={names[0]}") as stream:
            assert b'"type":"completed"' in b"".join(stream.iter_raw())
        usage = f"{urls['billing']}/v1/usage/generations/{names[0]}"
        await eventually(lambda: http.get(usage).status_code == 200, timeout=20)
        await eventually(lambda: http.get(usage).json()["status"] == "matched", timeout=20)
        assert http.get(f"{urls['delivery']}/v1/sessions").json()["sessions"]
        await _a_dead_request_runs_at_last(guarded, http, urls["delivery"])
        await _a_service_reads_through_a_durable_consumer(http, f"{urls['delivery']}/v1/consumers/reader")
        assert http.delete(f"{urls['delivery']}/v1/sessions/s").status_code == 204
        assert http.get(f"{urls['delivery']}/v1/sessions/s").status_code == 410
        assert http.get(usage).json()["status"] == "matched"
    assert guarded.violations() == []


async def _a_dead_request_runs_at_last(guarded: Guarded, http: httpx.Client, delivery: str) -> None:
    request = {"tenant": "default", "session": "s", "generation": "dead", "created_at": 1.0} | question()
    async with Broker.connect(guarded.url("producer"), "producer", tls=guarded.tls) as broker:
        for name in ("dead", "unwanted"):
            await broker.publish_stored(f"dead.default.{name}", json.dumps(request).encode())
    listed = http.get(f"{delivery}/v1/requests/dead").json()["requests"]
    assert [each["generation"] for each in listed] == ["dead", "unwanted"]
    resent = http.post(f"{delivery}/v1/requests/dead/dead/resend").json()
    generation = delivery + resent["links"]["generation"]
    await eventually(lambda: http.get(generation).json()["state"] == "completed", timeout=20)
    assert http.delete(f"{delivery}/v1/requests/dead/unwanted").status_code == 204
    assert http.get(f"{delivery}/v1/requests/dead").json()["requests"] == []


async def _a_service_reads_through_a_durable_consumer(http: httpx.Client, consumer: str) -> None:
    wish = {"types": ["completed"], "ack_wait": 0.5, "max_deliver": 1}
    assert http.put(consumer, json=wish).status_code == 201
    first = http.get(f"{consumer}/events?batch=10&wait=10").json()["events"]
    assert len(first) >= 2
    kept = {"acks": [e["token"] for e in first[1:]]}
    assert http.post(f"{consumer}/acks", json=kept).json() == {"settled": len(first) - 1, "unknown": []}
    assert http.post(f"{consumer}/pause").json()["paused"]
    assert not http.post(f"{consumer}/resume").json()["paused"]

    def dead() -> list[dict[str, object]]:
        assert http.get(f"{consumer}/events?batch=10&wait=1").json()["events"] == []
        return list(http.get(f"{consumer}/dead").json()["events"])

    (event,) = await eventually(dead, timeout=20)
    assert http.post(f"{consumer}/dead/{event['id']}/resend").status_code == 202
    assert len(http.get(f"{consumer}/events?batch=10&wait=10").json()["events"]) == 1
    assert [c["name"] for c in http.get(consumer.rpartition("/")[0]).json()["consumers"]] == ["reader"]
    assert http.delete(consumer).status_code == 204


FORBIDDEN_TO_PUBLISH = {
    "producer": [
        "deleted.default.s",
        "requests.default.g",
        "control.default.s.g",
        "live.0.default.s.g",
        "$JS.API.STREAM.DELETE.TOKENS_0",
        "$JS.API.STREAM.PURGE.TOKENS_0",
        "$JS.API.STREAM.UPDATE.TOKENS_0",
        "$JS.API.STREAM.CREATE.X",
        "$JS.API.STREAM.MSG.DELETE.TOKENS_0",
        "$JS.API.DIRECT.GET.REQUESTS",
        "$JS.API.STREAM.MSG.GET.REQUESTS_DEAD",
        "$JS.API.STREAM.PURGE.REQUESTS_DEAD",
        "$JS.API.CONSUMER.CREATE.TOKENS_0.x",
        "$JS.API.CONSUMER.DELETE.TOKENS_0.billing-0",
        "$JS.API.CONSUMER.MSG.NEXT.TOKENS_0.billing-0",
        "$KV.registry.topology.partitions",
        "$SYS.REQ.SERVER.PING",
    ],
    "delivery": [
        "tokens.0.default.s.g",
        "live.0.default.s.g",
        "presence.default.s.g",
        "holder.default.s.g",
        "dead.default.g",
        "$JS.API.STREAM.DELETE.REQUESTS",
        "$JS.API.STREAM.PURGE.REQUESTS",
        "$JS.API.STREAM.DELETE.REQUESTS_DEAD",
        "$JS.API.CONSUMER.MSG.NEXT.REQUESTS.producers-default",
        "$JS.API.CONSUMER.CREATE.TOKENS_0.billing-0",
        "$JS.API.CONSUMER.CREATE.REQUESTS.x",
        "$JS.API.CONSUMER.DURABLE.CREATE.TOKENS_0.billing-0",
        "$JS.API.CONSUMER.DELETE.TOKENS_0.billing-0",
        "$JS.API.CONSUMER.PAUSE.TOKENS_0.billing-0",
        "$JS.API.CONSUMER.MSG.NEXT.TOKENS_0.billing-0",
        "$JS.ACK.TOKENS_0.billing-0.1.1.1.1.1",
        "$JS.API.STREAM.MSG.DELETE.TOKENS_0",
        "$JS.API.STREAM.DELETE.TOKENS_0",
        "$JS.API.STREAM.PURGE.KV_generations",
        "$JS.API.STREAM.PURGE.DELIVERED",
        "$JS.API.DIRECT.GET.REQUESTS",
        "$JS.ACK.REQUESTS.producers-default.1.1.1.1.1",
        "$KV.registry.pool.default",
        "$KV.registry.topology.partitions",
    ],
    "billing": [
        "deleted.default.s",
        "tokens.0.default.s.g",
        "requests.default.g",
        "$JS.API.STREAM.DELETE.TOKENS_0",
        "$JS.API.CONSUMER.DELETE.TOKENS_0.svc-7-default-c",
        "$JS.API.CONSUMER.MSG.NEXT.REQUESTS.producers-default",
        "$JS.API.DIRECT.GET.KV_generations",
        "$KV.generations.default.s.g",
        "$KV.registry.pool.default",
        "consumers.dead.default.c.e",
        "$JS.API.CONSUMER.MSG.NEXT.TOKENS_0.svc-7-default-c",
    ],
    "setup": ["tokens.0.default.s.g", "requests.default.g", "control.default.s.g", "$KV.generations.default.s.g"],
}
FORBIDDEN_TO_HEAR = {
    "producer": [">", "requests.>", "live.>", "tokens.>", "$KV.>", "_INBOX.>", "_INBOX.delivery.>", "presence.>"],
    "delivery": [">", "tokens.>", "requests.>", "control.>", "holder.>", "$KV.>", "_INBOX.producer.>", "$JS.>"],
    "billing": [">", "tokens.>", "live.>", "requests.>", "_INBOX.setup.>", "presence.>"],
    "setup": [">", "tokens.>", "live.>", "_INBOX.producer.>"],
}


class Refusals:
    """A plain client as one of the users, and the permissions violations it received."""

    def __init__(self) -> None:
        self.errors: list[str] = []

    async def note(self, error: Exception) -> None:
        self.errors.append(str(error))

    def names(self, verb: str, subject: str) -> bool:
        return any(f'permissions violation for {verb} to "{subject}"' in error.lower() for error in self.errors)


async def plain(guarded: Guarded, user: str, refusals: Refusals) -> nats.NATS:
    return await nats.connect(
        guarded.url(user), tls=guarded.tls, inbox_prefix=f"_INBOX.{user}".encode(), error_cb=refusals.note
    )


@pytest.mark.parametrize("user", FORBIDDEN_TO_PUBLISH)
async def test_a_service_is_refused_to_publish_on_subjects_of_others(guarded: Guarded, user: str) -> None:
    refusals = Refusals()
    client = await plain(guarded, user, refusals)
    try:
        for subject in FORBIDDEN_TO_PUBLISH[user]:
            await client.publish(subject, b"{}")
            await client.flush()
            await eventually(lambda s=subject: refusals.names("publish", s.lower()), timeout=5)
    finally:
        await client.close()


@pytest.mark.parametrize("user", FORBIDDEN_TO_HEAR)
async def test_a_service_is_refused_to_subscribe_to_subjects_of_others(guarded: Guarded, user: str) -> None:
    refusals = Refusals()
    client = await plain(guarded, user, refusals)
    try:
        for subject in FORBIDDEN_TO_HEAR[user]:
            await client.subscribe(subject)
            await client.flush()
            await eventually(lambda s=subject: refusals.names("subscription", s.lower()), timeout=5)
    finally:
        await client.close()


async def test_producers_share_circuits_of_providers_with_any_name(guarded: Guarded) -> None:
    down = UpstreamFailure("upstream_overloaded", "busy", recoverable=True)
    async with Broker.connect(guarded.url("producer"), "producer", tls=guarded.tls) as broker:
        one, other = Circuits(broker, 1, 1_000.0), Circuits(broker, 1, 1_000.0)
        following = asyncio.create_task(other.follow())
        try:
            for name in ("plain", "my.own.provider"):
                permit = one.admit(name, "m", "t")
                assert permit is not None
                permit.failed(down, connected=True)
                await eventually(lambda name=name: other.is_open(name, "m", "t"))
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)


async def test_connections_without_password_certificate_or_trusted_authority_are_refused(guarded: Guarded) -> None:
    wrong = guarded.url("producer").replace("producer-secret", "guess")
    nobody = f"tls://127.0.0.1:{guarded.port}"
    stranger = client_tls(str(guarded.folder / "stranger.pem"), None, None)
    bare = client_tls(str(guarded.folder / "ca.pem"), None, None)
    for url, tls in (
        (wrong, guarded.tls),
        (nobody, guarded.tls),
        (guarded.url("producer"), stranger),
        (guarded.url("producer"), bare),
    ):
        with pytest.raises(BrokerUnavailable):
            async with Broker.connect(url, "producer", tls=tls, wait=1):
                pass


async def test_a_password_is_not_shown_to_a_server_without_tls(guarded: Guarded, nats_url: str) -> None:
    url = nats_url.replace("nats://", "nats://producer:secret@")
    with pytest.raises(BrokerUnavailable, match="offers no TLS"):
        async with Broker.connect(url, "producer", tls=guarded.tls, wait=2):
            pass


async def test_a_service_without_permission_to_create_streams_waits_for_them(nats_url: str, broker: Broker) -> None:
    await broker.js.delete_stream("TOKENS_0")
    expecting = Shared(nats_url=nats_url, manage_streams=False).topology()
    with pytest.raises(BrokerUnavailable, match="TOKENS_0 does not exist, and this service may not create it"):
        await broker.apply(expecting, wait=0.2)
    waiting = asyncio.create_task(broker.apply(expecting, wait=20))
    await broker.apply(Shared(nats_url=nats_url).topology())
    assert (await waiting).logs == (0,)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (Shared(nats_ca="/nowhere/ca.pem"), "TAILRACE_NATS_CA"),
        (Shared(nats_cert="c.pem"), "TAILRACE_NATS_KEY"),
        (Shared(nats_cert="c.pem", nats_key="k.pem"), "TAILRACE_NATS_CERT"),
    ],
)
def test_unusable_tls_files_are_named(settings: Shared, named: str) -> None:
    with pytest.raises(SettingsError, match=named):
        settings.tls()


@pytest.mark.parametrize("name", ["tailrace.conf", "cluster.conf", "private.conf"])
def test_nats_server_accepts_the_deployed_configurations(name: str, guarded: Guarded) -> None:
    shutil.copy(REPOSITORY / "deploy" / "nats" / name, guarded.folder / name)
    env = os.environ | {"NATS_NAME": "nats-1", "NATS_PASSWORD": "secret", "NATS_MAX_PAYLOAD": "17MB"}
    env |= {f"NATS_{user.upper()}_PASSWORD": word for user, word in PASSWORDS.items()}
    env |= {
        "NATS_TLS_CERT": str(guarded.folder / "127.0.0.1.pem"),
        "NATS_TLS_KEY": str(guarded.folder / "127.0.0.1.key"),
    }
    env["NATS_TLS_CA"] = str(guarded.folder / "ca.pem")
    checked = subprocess.run(
        [nats_server_path(), "-t", "-c", str(guarded.folder / name)],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stderr
