"""Checks of rendered manifests against the schemas of the systems that read them.

Kubernetes' schemas are its OpenAPI, from the package kubernetes-validate. Those of custom resources
are models generated from the operators' definitions. Compose's schema is that of its specification.
"""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml

KUBERNETES = ("1.31", kubernetes_validate.latest_version())
"""The oldest version that has every field in use, and the newest."""


def check_kubernetes(text: str) -> dict[str, dict[str, Any]]:
    """The manifests of a text by kind, or by kind and last part of the name if a kind repeats.

    Raises: an error of the schema that a manifest violates.
    """
    manifests: dict[str, dict[str, Any]] = {}
    for manifest in yaml.safe_load_all(text):
        kind = manifest["kind"]
        if kind in ("ScaledObject", "PodMonitor"):
            _custom(kind).model_validate(manifest, extra="forbid")
        else:
            for version in KUBERNETES:
                kubernetes_validate.validate(manifest, version, strict=True)
        name = manifest["metadata"]["name"].rpartition("-")[2]
        manifests[f"{kind}/{name}" if kind in manifests else kind] = manifest
    return manifests


def _custom(kind: str) -> Any:
    from cloudcoil.models.keda.v1alpha1 import ScaledObject
    from cloudcoil.models.prometheus_operator.v1 import PodMonitor

    return {"ScaledObject": ScaledObject, "PodMonitor": PodMonitor}[kind]


def check_compose(text: str, folder: Path) -> dict[str, Any]:
    """The only service of a Compose file. Raises: AssertionError if it violates the schema."""
    (folder / "compose.yaml").write_text(text)
    schema = ["--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run(
        [sys.executable, "-m", "check_jsonschema", *schema, str(folder / "compose.yaml")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    service: dict[str, Any]
    [service] = yaml.safe_load(text)["services"].values()
    return service


def check_ray(text: str) -> dict[str, Any]:
    """The only application of a Ray Serve config. Raises: an error of Ray's schema."""
    with warnings.catch_warnings(action="ignore"):  # Ray uses deprecated parts of pydantic
        from ray.serve.schema import ServeDeploySchema

    content = yaml.safe_load(text)
    ServeDeploySchema.model_validate(content, extra="forbid")
    application: dict[str, Any]
    [application] = content["applications"]
    return application
