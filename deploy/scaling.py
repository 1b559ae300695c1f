"""Autoscaling on Kubernetes, by the metric that says how many requests are in the house.

`triptych_admitted_sequences` counts what is computed and what waits; a replica computes as many
together as its model's config says, so that is how many each of them shall have. It needs
Prometheus, with its operator; and KEDA, or, for a plain HorizontalPodAutoscaler, an adapter that
serves the metrics of pods.
"""

from __future__ import annotations

import json
from typing import Any

from deploy.plan import Plan

METRIC = "triptych_admitted_sequences"
CALM_S = 300
"""How long less must be enough before a replica, which took minutes to load, is given up."""


def autoscaler(plan: Plan, pods: dict[str, str]) -> list[dict[str, Any]]:
    """What scales the Deployment whose pods have these labels; nothing if it has a fixed size."""
    if plan.options.max_replicas == plan.options.replicas:
        return []
    scaler = _keda(plan) if plan.options.autoscaler == "keda" else _hpa(plan)
    return [_monitor(plan, pods), scaler]


def _meta(plan: Plan) -> dict[str, Any]:
    return {"name": plan.options.name, "namespace": plan.options.namespace}


def _monitor(plan: Plan, pods: dict[str, str]) -> dict[str, Any]:
    endpoint: dict[str, Any] = {"port": "http", "path": "/metrics", "interval": "15s"}
    if secret := plan.options.api_key_secret:
        credentials = {"name": secret, "key": "api-key"}
        endpoint["authorization"] = {"type": "Bearer", "credentials": credentials}
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PodMonitor",
        "metadata": _meta(plan),
        "spec": {"selector": {"matchLabels": pods}, "podMetricsEndpoints": [endpoint]},
    }


def _keda(plan: Plan) -> dict[str, Any]:
    return {
        "apiVersion": "keda.sh/v1alpha1",
        "kind": "ScaledObject",
        "metadata": _meta(plan),
        "spec": {
            "scaleTargetRef": {"name": plan.options.name},
            "minReplicaCount": plan.options.replicas,
            "maxReplicaCount": plan.options.max_replicas,
            "advanced": {"horizontalPodAutoscalerConfig": {"behavior": _behavior()}},
            "triggers": [_trigger(plan, name, places) for name, places in _places(plan)],
        },
    }


def _trigger(plan: Plan, model: str, places: int) -> dict[str, Any]:
    matchers = {"namespace": plan.options.namespace, "model": model}
    # The pods' names, and not those of another deployment whose name only begins alike.
    selected = [f"{key}={json.dumps(value)}" for key, value in matchers.items()]
    selected.append(f'pod=~"{plan.options.name}-[a-z0-9]+-[a-z0-9]+"')
    return {
        "type": "prometheus",
        "metricType": "AverageValue",
        "metadata": {
            "serverAddress": plan.options.prometheus,
            "query": f"sum({METRIC}{{{','.join(selected)}}})",
            "threshold": str(places),
        },
    }


def _hpa(plan: Plan) -> dict[str, Any]:
    metrics = [
        {
            "type": "Pods",
            "pods": {
                "metric": {"name": METRIC, "selector": {"matchLabels": {"model": name}}},
                "target": {"type": "AverageValue", "averageValue": str(places)},
            },
        }
        for name, places in _places(plan)
    ]
    return {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": _meta(plan),
        "spec": {
            "scaleTargetRef": {
                "apiVersion": "apps/v1",
                "kind": "Deployment",
                "name": plan.options.name,
            },
            "minReplicas": plan.options.replicas,
            "maxReplicas": plan.options.max_replicas,
            "metrics": metrics,
            "behavior": _behavior(),
        },
    }


def _behavior() -> dict[str, Any]:
    return {"scaleDown": {"stabilizationWindowSeconds": CALM_S}}


def _places(plan: Plan) -> list[tuple[str, int]]:
    return [(model.config.name, model.config.places) for model in plan.models]
