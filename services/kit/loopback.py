"""Recognise addresses that only this machine reaches."""

from ipaddress import ip_address

__all__ = ["is_address", "is_loopback"]


def is_address(host: str) -> bool:
    """Return whether a host is a literal address, which needs no resolver."""
    try:
        ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Return whether a host name or address is this machine's own, independent of any resolver."""
    host = host.strip("[]").lower()
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
