"""Subjects with which services detect, and report to each other, that the broker refuses to store. Pure."""

from typing import Final

from schemas.topology import BUCKET, REGISTRY_BUCKET

__all__ = ["REFUSED_SUBJECT", "probe_subjects", "probes"]

REFUSED_SUBJECT: Final = "storage.refused"
"""Core subject on which a service reports that the broker has not stored its message."""
_PROBE: Final = "$KV.{bucket}.probe.{service}"


def probe_subjects(service: str) -> tuple[str, ...]:
    """Return the subjects of a service's probes: one in each bucket that it may write."""
    buckets = (REGISTRY_BUCKET,) if service == "billing" else (REGISTRY_BUCKET, BUCKET)
    # Fewer tokens than a record's key, so that no list of records contains it.
    return tuple(_PROBE.format(bucket=bucket, service=service) for bucket in buckets)


def probes(service: str) -> tuple[str, ...]:
    """Return all storage subjects that a service publishes to."""
    return (*probe_subjects(service), REFUSED_SUBJECT)
