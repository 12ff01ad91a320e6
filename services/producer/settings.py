"""Settings of the producer, its model registry included."""

from collections.abc import Mapping
from typing import Annotated, Literal

import msgspec

from services.kit.settings import SettingsError, Shared, load_settings, read_config
from services.producer.core.deadlines import Deadlines
from services.producer.core.registry import Registry, RegistryError
from services.producer.core.retry import RetryPolicy

__all__ = ["Settings", "load_producer_settings"]

Positive = Annotated[float, msgspec.Meta(gt=0)]


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of the producer. Times in seconds.

    ``slots``: how many generations run at once in one process. ``drain``: how long running ones may go on after
    SIGTERM. ``connect``, ``first_token``, ``between_tokens`` and ``total`` are deadlines of each call.
    """

    host: str = "127.0.0.1"
    port: int = 8082
    slots: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 1_000
    drain: Annotated[float, msgspec.Meta(ge=0)] = 20.0
    connect: Positive = 10.0
    first_token: Positive = 30.0
    between_tokens: Positive = 30.0
    total: Positive = 900.0
    ack_timeout: Positive = 2.0
    append_timeout: Positive = 60.0
    retry_attempts: Annotated[int, msgspec.Meta(ge=1, le=20)] = 3
    retry_wait: Literal["exponential", "linear"] = "exponential"
    retry_base: Positive = 0.5
    retry_maximum: Positive = 20.0
    circuit_failures: Annotated[int, msgspec.Meta(ge=1)] = 5
    circuit_seconds: Positive = 15.0

    def retry(self) -> RetryPolicy:
        """Return the retry policy of calls."""
        return RetryPolicy(
            max_attempts=self.retry_attempts, wait=self.retry_wait, base=self.retry_base, maximum=self.retry_maximum
        )

    def deadlines(self) -> Deadlines:
        """Return the default deadlines, which a model's own override."""
        return Deadlines(
            connect=self.connect,
            first_token=self.first_token,
            between_tokens=self.between_tokens,
            total=self.total,
        )


def load_producer_settings(env: Mapping[str, str]) -> tuple[Shared, Settings, Registry]:
    """Return the shared settings, those of the producer, and the model registry.

    Raises:
        SettingsError: with all problems in any of them.
    """
    problems: list[str] = []
    loaded = registry = None
    try:
        loaded = load_settings(Settings, "producer", env)
    except SettingsError as error:
        problems += error.problems
    try:
        registry = Registry.load(read_config(env), env)
    except RegistryError as error:
        problems += error.problems
    except SettingsError:  # the file is unreadable; reported above
        pass
    if loaded is None or registry is None:
        raise SettingsError(problems)
    return *loaded, registry
