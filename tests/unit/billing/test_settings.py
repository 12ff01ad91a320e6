"""Billing's settings about money."""

import pytest

from services.billing.core.charging import Charging
from services.billing.core.reconciliation import Tolerance
from services.billing.settings import Settings
from services.kit.settings import SettingsError, load_settings


def loaded(**variables: str) -> Settings:
    env = {f"TAILRACE_BILLING_{name.upper()}": value for name, value in variables.items()}
    return load_settings(Settings, "billing", env)[1]


def test_tolerances_and_policies_are_read() -> None:
    settings = loaded(
        tolerances="openai/gpt-*=20/0.05, */o=1=0/0", partial="none", tenant_partial="acme=reported", missing="reported"
    )
    assert settings.policy().models == (
        Tolerance(model="openai/gpt-*", absolute=20, relative=0.05),
        Tolerance(model="*/o=1", absolute=0, relative=0.0),
    )
    assert settings.charging() == Charging(partial="none", missing="reported", tenants={"acme": "reported"})
    assert [settings.charging().of(tenant) for tenant in ("acme", "other")] == ["reported", "none"]


def test_shipped_prices_are_on_unless_switched_off() -> None:
    assert loaded().shipped_prices
    assert not loaded(shipped_prices="false").shipped_prices


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tolerances", "gpt"),
        ("tolerances", "gpt=1"),
        ("tolerances", "=1/0.1"),
        ("tolerances", "gpt=-1/0.1"),
        ("tolerances", "gpt=1/2"),
        ("tenant_partial", "acme"),
        ("tenant_partial", "acme=free"),
        ("partial", "free"),
        ("missing", ""),
    ],
)
def test_an_invalid_setting_is_reported_with_its_variable(name: str, value: str) -> None:
    with pytest.raises(SettingsError, match=f"TAILRACE_BILLING_{name.upper()}"):
        loaded(**{name: value})
