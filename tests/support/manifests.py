"""The schemas that manifests are held to: those of the systems that will read them.

Kubernetes' are its own OpenAPI, by the package kubernetes-validate; those of custom resources are
models made from the operators' definitions; Compose's is the one of its specification.
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
"""The oldest that has all we use, and the newest."""


def check_kubernetes(text: str) -> dict[str, dict[str, Any]]:
    """The manifests of a text, by kind (and the name's last part, where several are of one).

    Raises: an error of the schema that one of them does not fit.
    """
    found: dict[str, dict[str, Any]] = {}
    for manifest in yaml.safe_load_all(text):
        kind = manifest["kind"]
        if kind in ("ScaledObject", "PodMonitor"):
            _custom(kind).model_validate(manifest, extra="forbid")
        else:
            for version in KUBERNETES:
                kubernetes_validate.validate(manifest, version, strict=True)
        name = manifest["metadata"]["name"].rpartition("-")[2]
        found[f"{kind}/{name}" if kind in found else kind] = manifest
    return found


def _custom(kind: str) -> Any:
    from cloudcoil.models.keda.v1alpha1 import ScaledObject
    from cloudcoil.models.prometheus_operator.v1 import PodMonitor

    return {"ScaledObject": ScaledObject, "PodMonitor": PodMonitor}[kind]


def check_compose(text: str, folder: Path) -> dict[str, Any]:
    """The one service of a Compose file. Raises: AssertionError if it does not fit the schema."""
    (folder / "compose.yaml").write_text(text)
    schema = ["--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run(
        [sys.executable, "-m", "check_jsonschema", *schema, str(folder / "compose.yaml")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    [service] = yaml.safe_load(text)["services"].values()
    found: dict[str, Any] = service
    return found


def check_ray(text: str) -> dict[str, Any]:
    """The application of a Ray Serve config. Raises: an error of Ray's schema."""
    with warnings.catch_warnings(action="ignore"):  # its own of pydantic
        from ray.serve.schema import ServeDeploySchema

    content = yaml.safe_load(text)
    ServeDeploySchema.model_validate(content, extra="forbid")
    [application] = content["applications"]
    found: dict[str, Any] = application
    return found
