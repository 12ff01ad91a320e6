"""Structured logs, and the process's Prometheus registry."""

import logging
import re
import sys
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any, Final, Literal

import structlog
from prometheus_client import Info
from structlog.typing import EventDict, WrappedLogger

__all__ = ["configure_logging", "describe_service", "scrub"]

_SECRET_KEYS: Final = re.compile(r"(authorization|api[-_]?key|token|secret|password|ticket)$", re.IGNORECASE)
_SECRET_TEXT: Final = re.compile(
    r"(?i)((?:bearer|basic)\s+|(?:api[-_]?key|password|secret|token|ticket)[\"']?\s*[:=]\s*[\"']?)"
    r"[A-Za-z0-9._~+/=-]{6,}"
    r"|\btr_[a-z0-9]{4,32}_[A-Za-z0-9_-]{8,}"
    r"|\b(?:sk|pk|rk|xai|gsk)-[A-Za-z0-9_-]{8,}|\bhf_[A-Za-z0-9]{8,}|\bAIza[A-Za-z0-9_-]{20,}"
    r"|\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}(?:\.[A-Za-z0-9_-]+)?"
    r"|(?<=://)[^/\s@]+(?=@)"
)


SERVICE: Final = Info("tailrace_service", "The service, its version, and the settings that all services must share")


def describe_service(service: str, settings: Mapping[str, object]) -> None:
    """Publish the service's version and settings as the metric ``tailrace_service_info``; no value may be secret."""
    SERVICE.info({"service": service, "version": version("tailrace"), **{k: str(v) for k, v in settings.items()}})


def scrub(text: str) -> str:
    """Replace text that looks like a credential by ``***``."""
    return _SECRET_TEXT.sub(lambda m: (m.group(1) or "") + "***", text)


def _scrub_event(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    return {key: "***" if _SECRET_KEYS.search(key) else _scrub_value(value) for key, value in event.items()}


def _scrub_value(value: Any) -> Any:
    if isinstance(value, str):
        return scrub(value)
    if isinstance(value, dict):
        return {k: "***" if _SECRET_KEYS.search(str(k)) else _scrub_value(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_scrub_value(v) for v in value]
    return value


def configure_logging(service: str, level: str, format_: Literal["auto", "json", "console"]) -> None:
    """Write structured logs to standard error: JSON lines, or colours on a terminal (``auto`` detects one)."""
    console = format_ == "console" or (format_ == "auto" and sys.stderr.isatty())
    renderer: Any = structlog.dev.ConsoleRenderer() if console else structlog.processors.JSONRenderer()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.format_exc_info,
            _scrub_event,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(service=service)
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(name)s: %(message)s")
    for noisy in ("nats", "_granian", "granian.access"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
