"""How services find out, and tell each other, whether the broker stores what it is sent. Pure."""

from typing import Final

from schemas.topology import BUCKET, REGISTRY_BUCKET

__all__ = ["REFUSED_SUBJECT", "probe_subjects", "probes"]

REFUSED_SUBJECT: Final = "storage.refused"
"""Core subject on which a service says that something it sent has not been stored."""
_PROBE: Final = "$KV.{bucket}.probe.{service}"


def probe_subjects(service: str) -> tuple[str, ...]:
    """Return the subjects that a service writes to: one in each bucket that it may write."""
    buckets = (REGISTRY_BUCKET,) if service == "billing" else (REGISTRY_BUCKET, BUCKET)
    # Fewer tokens than a record's key has, so that no list of records finds it.
    return tuple(_PROBE.format(bucket=bucket, service=service) for bucket in buckets)


def probes(service: str) -> tuple[str, ...]:
    """Return what a service publishes to for all of this."""
    return (*probe_subjects(service), REFUSED_SUBJECT)
