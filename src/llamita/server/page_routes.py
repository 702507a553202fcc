"""The page at `/`: static files out of the package, and the rules by which a browser may treat them."""

from pathlib import Path

from fastapi import APIRouter
from starlette.responses import FileResponse, Response

from llamita.server.errors import ApiError

PAGE = Path(__file__).parent / "page"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "font-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cache-Control": "no-cache",
    "X-Frame-Options": "DENY",
}
"""A browser runs the package's own scripts and no others, asks this server and no other, and shows no part of the page
within another site."""


def router() -> APIRouter:
    routes = APIRouter(include_in_schema=False)

    @routes.get("/")
    async def page() -> Response:
        return file("index.html")

    @routes.get("/favicon.ico")
    async def icon() -> Response:
        return file("llamita.svg")

    @routes.get("/page/{name}")
    async def part(name: str) -> Response:
        return file(name)

    return routes


def file(name: str) -> Response:
    """Returns a file of the page by its bare name; 404 where there is none of that name."""
    found = PAGE / name
    if Path(name).name != name or found.suffix not in TYPES or not found.is_file():
        raise ApiError(404, f"the page has no part {name[:100]!r}")
    return FileResponse(found, media_type=TYPES[found.suffix], headers=HEADERS)
