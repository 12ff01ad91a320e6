"""Delivery's errors, grouped by what a client must do."""

__all__ = ["CursorExpired", "CursorForeign", "Deleted", "DeliveryError", "TooBusy", "Unknown"]


class DeliveryError(Exception):
    """Base of all errors of this service."""


class CursorForeign(DeliveryError):
    """Reject: the cursor is not one of this session."""


class CursorExpired(DeliveryError):
    """Start over: what follows the cursor is no longer kept, or the log has been re-created."""


class Unknown(DeliveryError):
    """Reject: no such generation."""


class Deleted(DeliveryError):
    """Reject: the session was deleted."""


class TooBusy(DeliveryError):
    """Retry later: a bound of this replica is reached."""
