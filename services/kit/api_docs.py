"""The documentation page of an HTTP API: Swagger UI from a pinned package, served locally without other sources."""

import functools
from html import escape
from pathlib import Path
from typing import Any, Final

from litestar import Request, Response, Router, get
from litestar.datastructures import ResponseHeader
from litestar.exceptions import NotFoundException
from litestar.openapi import OpenAPIConfig
from litestar.openapi.plugins import OpenAPIRenderPlugin
from litestar.params import FromPath
from swagger_ui_bundle import swagger_ui_path

from services.kit.auth.guards import SECURITY

__all__ = ["ASSETS", "documented"]

ASSETS: Final[dict[str, tuple[Path, str]]] = {
    "swagger-ui-bundle.js": (Path(swagger_ui_path) / "swagger-ui-bundle.js", "text/javascript"),
    "swagger-ui.css": (Path(swagger_ui_path) / "swagger-ui.css", "text/css"),
    "favicon-32x32.png": (Path(swagger_ui_path) / "favicon-32x32.png", "image/png"),
    "api_docs.js": (Path(__file__).with_name("api_docs.js"), "text/javascript"),
    "api_docs.css": (Path(__file__).with_name("api_docs.css"), "text/css"),
}
"""Assets of the page, by name: file and media type."""
_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_PAGE: Final = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="icon" type="image/png" href="{path}/assets/favicon-32x32.png">
<link rel="stylesheet" href="{path}/assets/swagger-ui.css">
<link rel="stylesheet" href="{path}/assets/api_docs.css">
<script src="{path}/assets/swagger-ui-bundle.js" defer></script>
<script src="{path}/assets/api_docs.js" defer></script>
</head>
<body>
<noscript>This page needs JavaScript. It shows <a href="{path}/openapi.json">openapi.json</a>.</noscript>
<main id="docs" data-document="{path}/openapi.json"></main>
</body>
</html>
"""


def documented(title: str, description: str, path: str) -> OpenAPIConfig:
    """Return the OpenAPI configuration of an API: page at ``path``, document at ``openapi.json`` below it."""
    headers = {"Content-Security-Policy": _POLICY, "Cache-Control": "no-cache"}
    router = Router(
        path,
        route_handlers=[],
        include_in_schema=False,
        dto=None,
        return_dto=None,
        response_headers=[ResponseHeader(name=name, value=value) for name, value in headers.items()],
    )
    return OpenAPIConfig(
        title=title,
        version="1",
        description=description,
        components=SECURITY,
        openapi_router=router,
        render_plugins=[_SwaggerUi(path)],
    )


class _SwaggerUi(OpenAPIRenderPlugin):
    """Serve the page and its assets."""

    def __init__(self, path: str) -> None:
        super().__init__(path="/")
        self._path = path

    def render(self, request: Request[Any, Any, Any], openapi_schema: dict[str, Any]) -> bytes:
        """Render the page."""
        return _PAGE.format(title=escape(openapi_schema["info"]["title"]), path=self._path).encode()

    def receive_router(self, router: Router) -> None:
        """Register the asset routes."""
        router.register(_asset)


@get("/assets/{name:str}", sync_to_thread=False)
def _asset(name: FromPath[str]) -> Response[bytes]:
    if name not in ASSETS:
        raise NotFoundException
    return Response(_content(name), media_type=ASSETS[name][1], headers={"Cache-Control": "max-age=3600"})


@functools.cache  # bounded by `ASSETS`
def _content(name: str) -> bytes:
    return ASSETS[name][0].read_bytes()
