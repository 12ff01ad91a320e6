"""Which addresses only this machine reaches."""

from ipaddress import ip_address

__all__ = ["is_address", "is_loopback"]


def is_address(host: str) -> bool:
    """Tell whether a host is written as an address, so that no resolver has a say in where it leads."""
    try:
        ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Tell whether a host name or address is this machine's own, whatever resolves names."""
    host = host.strip("[]").lower()
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
