"""The operations of the tasks, for the document."""

from __future__ import annotations

from api.http.openapi import ANY_MODEL, JSON, Operation, errors, ok
from api.tasks.routes import ROUTES

OPERATIONS = [
    Operation(
        "post",
        f"/tasks/{task}",
        task.replace("-", "_"),
        route.body.__doc__ or "",
        ok({JSON: route.response}) | errors(*ANY_MODEL),
        body={JSON: route.body},
    )
    for task, route in ROUTES.items()
]
