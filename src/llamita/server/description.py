"""The description of the API (/openapi.json), as the server really answers.

FastAPI would describe its own answer to a body that does not fit, 422, which app.py turns into 400. Knows no endpoint.
"""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

FRAMEWORKS_OWN = ("HTTPValidationError", "ValidationError")


def describe(app: FastAPI) -> dict[str, Any]:
    """Returns the OpenAPI document of an application, without what is never sent."""
    description = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    for methods in description["paths"].values():
        for operation in methods.values():
            operation["responses"].pop("422", None)
    schemas = description.get("components", {}).get("schemas", {})
    for name in FRAMEWORKS_OWN:
        schemas.pop(name, None)
    return description
