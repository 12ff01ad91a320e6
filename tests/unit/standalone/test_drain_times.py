"""Test that grace periods around the services are longer than their own shutdown."""

import re
from pathlib import Path

import pytest

from services.billing.settings import Settings as Billing
from services.delivery.settings import Settings as Delivery
from services.delivery.workers import WORKER_SECONDS
from services.kit.shutdown import ANSWERS, CUT, HAND_OVER, MARGIN
from services.producer.settings import Settings as Producer
from services.standalone.plan import DRAIN, plan_services
from tests.unit.standalone.test_plan import options

REPOSITORY = Path(__file__).parents[3]
BOUNDS = {
    "producer": Producer().drain + MARGIN,
    "delivery": Delivery().drain + WORKER_SECONDS + MARGIN,
    "billing": Billing().drain + MARGIN,
}


def test_the_steps_of_the_margin_follow_each_other() -> None:
    assert 0 < HAND_OVER < ANSWERS < CUT < MARGIN


@pytest.mark.parametrize("service", BOUNDS)
def test_compose_gives_more_time_than_a_service_takes(service: str) -> None:
    text = (REPOSITORY / "compose.yaml").read_text()
    (period,) = re.findall(r"^x-service:.*?^  stop_grace_period: (\d+)s$", text, re.MULTILINE | re.DOTALL)
    assert int(period) > BOUNDS[service]
    block = text[text.index(f"\n  {service}:\n") :]
    assert "<<: *service" in block[: block.index("\n\n")]


@pytest.mark.parametrize(
    ("variables", "config", "producer", "delivery"),
    [
        ({}, {}, DRAIN + MARGIN, DRAIN + MARGIN),
        ({"TAILRACE_PRODUCER_DRAIN": "60"}, {"delivery": {"drain": 7}}, 60 + MARGIN, 7 + MARGIN),
        ({"TAILRACE_DELIVERY_WORKERS": "2"}, {}, DRAIN + MARGIN, DRAIN + WORKER_SECONDS + MARGIN),
        ({"TAILRACE_PRODUCER_DRAIN": "long"}, {}, DRAIN + MARGIN, DRAIN + MARGIN),
    ],
)
def test_up_gives_more_time_than_a_service_takes(
    tmp_path: Path, variables: dict[str, str], config: dict[str, object], producer: float, delivery: float
) -> None:
    specs = {spec.name: spec for spec in plan_services(options(tmp_path), variables, config, "/nats-server")}
    assert specs["producer"].grace > producer
    assert specs["delivery"].grace > delivery
    assert specs["billing"].grace > DRAIN + MARGIN


def test_up_gives_producers_a_short_drain_unless_a_setting_overrides_it(tmp_path: Path) -> None:
    def drain(config: dict[str, object], **variables: str) -> str | None:
        (spec,) = (s for s in plan_services(options(tmp_path), variables, config, "/nats") if s.name == "producer")
        return spec.env.get("TAILRACE_PRODUCER_DRAIN")

    assert drain({}) == f"{DRAIN:g}"
    assert drain({}, TAILRACE_PRODUCER_DRAIN="9") == "9"
    assert drain({"producer": {"drain": 9}}) is None, "the file decides"
