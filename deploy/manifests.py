"""What all Kubernetes manifests have in common: a name, and labels to find each other by."""

from __future__ import annotations

from typing import Any

from deploy.plan import Plan

Manifest = dict[str, Any]
NAME, INSTANCE, ROLE = (f"app.kubernetes.io/{key}" for key in ("name", "instance", "component"))
SERVES, HOLDS = "server", "ranks"


def labels(plan: Plan, role: str | None = SERVES) -> dict[str, str]:
    """The labels of the pods of a role, or what those of all have in common."""
    found = {NAME: "triptych", INSTANCE: plan.options.name}
    return found | ({ROLE: role} if role else {})


def manifest(plan: Plan, kind: str, version: str, spec: Manifest, *, suffix: str = "") -> Manifest:
    """A manifest of `apiVersion` version."""
    meta = {
        "name": plan.options.name + suffix,
        "namespace": plan.options.namespace,
        "labels": labels(plan, None),
    }
    return {"apiVersion": version, "kind": kind, "metadata": meta, "spec": spec}
