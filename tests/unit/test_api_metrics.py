"""The metrics' labels of routes."""

from __future__ import annotations

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route

from api.app import create_app
from api.http.metrics import NO_ROUTE, RouteLabels


async def endpoint(request: Request) -> Response:
    return Response()


INNER = Starlette(
    routes=[
        Route("/v1/models", endpoint),
        Route("/v1/models/{model_id:path}", endpoint),
        Route("/predictions/{model_name}", endpoint),
        Route("/predictions/{model_name}/{version}", endpoint),
    ]
)
ROUTES = [
    Route("/generate", endpoint),
    Route("/generate_image_task/status", endpoint),
    Mount("/mounted", routes=[Route("/{name}", endpoint)]),
    Mount("/", app=INNER),
    Route("/", endpoint),
]


@pytest.mark.parametrize(
    ("path", "label"),
    [
        ("/", "/"),
        ("/generate", "/generate"),
        ("/generate/", NO_ROUTE),
        ("/generate_image_task/status", "/generate_image_task/status"),
        ("/v1/models", "/v1/models"),
        ("/v1/models/a/b", "/v1/models"),
        ("/v1/modelsx", NO_ROUTE),
        ("/predictions", "/predictions"),
        ("/predictions/bloom/1.0", "/predictions"),
        ("/mounted/x", "/mounted"),
        ("/wp-admin/setup.php", NO_ROUTE),
        ("", NO_ROUTE),
    ],
)
def test_a_label_is_the_template_up_to_a_parameter(path: str, label: str) -> None:
    assert RouteLabels(ROUTES).label(path) == label


def test_every_route_of_the_app_has_a_label() -> None:
    app = create_app()
    labels = RouteLabels([Mount("/", app=app)])
    paths = [route.path for route in app.routes if isinstance(route, Route)]
    assert "/tasks/fill-mask" in paths
    for path in paths:
        assert labels.label(path.replace("{", "").replace("}", "")) != NO_ROUTE, path
