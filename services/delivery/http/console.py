"""Serve the console: its static files and the configuration that they fetch."""

from pathlib import Path
from typing import Any, Final

from litestar import MediaType, Response, get, route
from litestar.datastructures import CacheControlHeader
from litestar.static_files import create_static_files_router

from services.delivery.settings import Settings

__all__ = ["console_handlers"]

_CONSOLE: Final = Path(__file__).parent.parent / "console"
_CONSOLE_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src {connect}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def console_handlers(settings: Settings, *, asks: bool) -> list[Any]:
    """Return the route handlers of the console; ``asks``: whether the page must ask for an API key."""
    connect = "'self'" + (f" {settings.billing_url}" if settings.billing_url else "")
    headers = {
        "Content-Security-Policy": _CONSOLE_POLICY.format(connect=connect),
        "Cache-Control": "no-cache",
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }

    @route("/", http_method=["GET", "HEAD"], include_in_schema=False, sync_to_thread=False)
    def page() -> Response[bytes]:
        return Response((_CONSOLE / "index.html").read_bytes(), media_type=MediaType.HTML, headers=headers)

    @route("/console/usage", http_method=["GET", "HEAD"], include_in_schema=False, sync_to_thread=False)
    def usage_page() -> Response[bytes]:
        return Response((_CONSOLE / "usage.html").read_bytes(), media_type=MediaType.HTML, headers=headers)

    @get("/console/config.json", include_in_schema=False, sync_to_thread=False)
    def config() -> dict[str, Any]:
        return {"billing": settings.billing_url, "models": settings.console_models, "credentials": asks}

    files = create_static_files_router(
        "/console", [_CONSOLE], include_in_schema=False, cache_control=CacheControlHeader(no_cache=True)
    )
    return [page, usage_page, config, files]
