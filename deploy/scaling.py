"""Autoscaling on Kubernetes, by the metric that says how many requests are in the house.

`triptych_admitted_sequences` counts what is computed and what waits; a replica computes as many
together as its model's config says, so that is how many each of them shall have. It needs
Prometheus, with its operator; and KEDA, or, for a plain HorizontalPodAutoscaler, an adapter that
serves the metrics of pods.
"""

from __future__ import annotations

import json

from deploy.manifests import Manifest, labels, manifest
from deploy.plan import Plan

METRIC = "triptych_admitted_sequences"
CALM_S = 300
"""How long less must be enough before a replica, which took minutes to load, is given up."""


def autoscaler(plan: Plan) -> list[Manifest]:
    """What scales the Deployment; nothing if it has a fixed size."""
    if plan.max_replicas == plan.options.replicas:
        return []
    scaler = _keda(plan) if plan.options.autoscaler == "keda" else _hpa(plan)
    return [_monitor(plan), scaler]


def _monitor(plan: Plan) -> Manifest:
    endpoint: Manifest = {"port": "http", "path": "/metrics", "interval": "15s"}
    if secret := plan.options.api_key_secret:
        credentials = {"name": secret, "key": "api-key"}
        endpoint["authorization"] = {"type": "Bearer", "credentials": credentials}
    spec = {"selector": {"matchLabels": labels(plan)}, "podMetricsEndpoints": [endpoint]}
    return manifest(plan, "PodMonitor", "monitoring.coreos.com/v1", spec)


def _keda(plan: Plan) -> Manifest:
    spec = {
        "scaleTargetRef": {"name": plan.options.name},
        "minReplicaCount": plan.options.replicas,
        "maxReplicaCount": plan.max_replicas,
        "advanced": {"horizontalPodAutoscalerConfig": {"behavior": _behavior()}},
        "triggers": [_trigger(plan, name, places) for name, places in _places(plan)],
    }
    return manifest(plan, "ScaledObject", "keda.sh/v1alpha1", spec)


def _trigger(plan: Plan, model: str, places: int) -> Manifest:
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


def _hpa(plan: Plan) -> Manifest:
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
    target = {"apiVersion": "apps/v1", "kind": "Deployment", "name": plan.options.name}
    spec = {
        "scaleTargetRef": target,
        "minReplicas": plan.options.replicas,
        "maxReplicas": plan.max_replicas,
        "metrics": metrics,
        "behavior": _behavior(),
    }
    return manifest(plan, "HorizontalPodAutoscaler", "autoscaling/v2", spec)


def _behavior() -> Manifest:
    return {"scaleDown": {"stabilizationWindowSeconds": CALM_S}}


def _places(plan: Plan) -> list[tuple[str, int]]:
    return [(model.config.name, model.config.max_concurrency) for model in plan.models]
