"""Errors of the producer, grouped by the reaction of the caller."""

__all__ = ["Fenced", "GiveUp", "LogRefused", "LogUnavailable", "ProducerError", "TryAgain"]


class ProducerError(Exception):
    """Base of all errors of this service."""


class TryAgain(ProducerError):
    """Hand the request back to the queue: another attempt, here or elsewhere, may work."""


class GiveUp(ProducerError):
    """Stop at once without writing anything more: another producer owns the generation."""


class LogUnavailable(TryAgain):
    """The log took no event for too long (broker away, stream full)."""

    def __init__(self, unacknowledged: int, seconds: float, reason: str) -> None:
        self.unacknowledged = unacknowledged
        super().__init__(
            f"the log acknowledged nothing for {seconds:.1f} s with {unacknowledged} events under way: "
            f"{reason or 'no answer'}"
        )


class LogRefused(GiveUp):
    """A conditional append found that another producer has written to the generation."""


class Fenced(GiveUp):
    """The lease is lost, or expired before the first append: another producer may own the generation."""
