"""Kubernetes manifests: a Deployment that scales with its load, or StatefulSets over several nodes.

A replica that is spread over several nodes has one pod on each. The first pod serves and the others
run their node's ranks (`cli.join`); each takes its node rank from its pod index.

Autoscaling goes by `triptych_admitted_sequences`, the requests that are running or queued: its
target is the number that a replica computes at once. It needs Prometheus with its operator, and
KEDA; or, for a plain HorizontalPodAutoscaler, an adapter that serves the metrics of pods.
"""

from __future__ import annotations

import json
import math
from typing import Any

from deploy.plan import (
    BENTO_PATH,
    GIB,
    HOME,
    MODELS,
    PRE_STOP_S,
    RENDEZVOUS_PORT,
    START_MARGIN_S,
    USER,
    Plan,
    nodes_of,
    rendezvous,
)
from runners.contracts.errors import ConfigError
from settings import PREFIX, variable

Manifest = dict[str, Any]

NAME, INSTANCE, ROLE = (f"app.kubernetes.io/{key}" for key in ("name", "instance", "component"))
SERVER, RANKS = "server", "ranks"
"""Roles of pods: the one that serves, and those that run the ranks of the other nodes."""
GPU = "nvidia.com/gpu"
POD_INDEX = "metadata.labels['apps.kubernetes.io/pod-index']"
PROBE_S = 10
METRIC = "triptych_admitted_sequences"
SCALE_DOWN_S = 300
"""How long the load must be lower before a replica, which took minutes to load, is removed."""


def manifests(plan: Plan) -> list[Manifest]:
    """Everything to `kubectl apply`. Raises: ConfigError if Kubernetes cannot run the plan."""
    plan.require_models("the claim of a volume")
    if plan.nnodes == 1:
        return [_service(plan), _deployment(plan), _disruption_budget(plan), *_autoscaling(plan)]
    if plan.max_replicas > 1:
        raise ConfigError(
            f"a model over {plan.nnodes} nodes has one replica: for more, render it again under "
            "another --name"
        )
    return [
        _service(plan),
        _headless_service(plan),
        _network_policy(plan),
        *_node_sets(plan),
        _disruption_budget(plan),
    ]


def _manifest(plan: Plan, kind: str, version: str, spec: Manifest, *, suffix: str = "") -> Manifest:
    """A manifest of `apiVersion` version."""
    meta = {
        "name": plan.options.name + suffix,
        "namespace": plan.options.namespace,
        "labels": _labels(plan, None),
    }
    return {"apiVersion": version, "kind": kind, "metadata": meta, "spec": spec}


def _labels(plan: Plan, role: str | None = SERVER) -> dict[str, str]:
    """The labels of a role's pods; those of all pods if `role` is None."""
    labels = {NAME: "triptych", INSTANCE: plan.options.name}
    return labels | ({ROLE: role} if role else {})


def _service(plan: Plan) -> Manifest:
    spec: Manifest = {
        "selector": _labels(plan),
        "ports": [{"name": "http", "port": 80, "targetPort": "http"}],
    }
    if plan.splits_jobs:
        # Only the replica that accepted a job knows its status and result.
        spec["sessionAffinity"] = "ClientIP"
    return _manifest(plan, "Service", "v1", spec)


def _deployment(plan: Plan) -> Manifest:
    surge, unavailable = (1, 0) if plan.options.surge else (0, 1)
    spec = {
        "replicas": plan.options.replicas,
        "selector": {"matchLabels": _labels(plan)},
        "strategy": {"rollingUpdate": {"maxSurge": surge, "maxUnavailable": unavailable}},
        # The default would report a start within start_timeout as failed.
        "progressDeadlineSeconds": plan.start_s + plan.stop_s + START_MARGIN_S,
        "template": _template(plan, SERVER, _server(plan)),
    }
    if plan.max_replicas > plan.options.replicas:
        del spec["replicas"]  # each `kubectl apply` would undo what the autoscaler did
    return _manifest(plan, "Deployment", "apps/v1", spec)


def _disruption_budget(plan: Plan) -> Manifest:
    # `minAvailable: 1` would keep the node of a single replica from ever being drained.
    spec = {"maxUnavailable": 1, "selector": {"matchLabels": _labels(plan, None)}}
    return _manifest(plan, "PodDisruptionBudget", "policy/v1", spec)


def _headless_service(plan: Plan) -> Manifest:
    spec = {
        "clusterIP": "None",
        "publishNotReadyAddresses": True,  # ranks connect before any pod is ready
        "selector": _labels(plan, None),
        "ports": [{"name": "rendezvous", "port": RENDEZVOUS_PORT}],
    }
    return _manifest(plan, "Service", "v1", spec, suffix="-nodes")


def _network_policy(plan: Plan) -> Manifest:
    """Isolation for the traffic between ranks, which is neither encrypted nor authenticated."""
    pods = {"from": [{"podSelector": {"matchLabels": _labels(plan, None)}}]}
    spec = {
        "podSelector": {"matchLabels": _labels(plan, None)},
        "policyTypes": ["Ingress"],
        "ingress": [pods, {"ports": [{"port": "http"}]}],
    }
    return _manifest(plan, "NetworkPolicy", "networking.k8s.io/v1", spec)


def _node_sets(plan: Plan) -> list[Manifest]:
    variables = {
        f"{PREFIX}NNODES": str(plan.nnodes),
        f"{PREFIX}RDZV_ENDPOINT": rendezvous(plan.options.name),
    }
    server = _server(plan)
    server["env"] = _env(plan.container_environment() | variables) + _api_key(plan)
    return [
        _node_set(plan, SERVER, server, count=1, first=0),
        _node_set(plan, RANKS, _rank_container(plan, variables), count=plan.nnodes - 1, first=1),
    ]


def _node_set(plan: Plan, role: str, container: Manifest, *, count: int, first: int) -> Manifest:
    spec = {
        "serviceName": f"{plan.options.name}-nodes",
        "replicas": count,
        "ordinals": {"start": first},
        "podManagementPolicy": "Parallel",
        "selector": {"matchLabels": _labels(plan, role)},
        "template": _template(plan, role, container),
    }
    suffix = "" if role == SERVER else f"-{role}"
    return _manifest(plan, "StatefulSet", "apps/v1", spec, suffix=suffix)


def _template(plan: Plan, role: str, container: Manifest) -> Manifest:
    spec: Manifest = {
        "automountServiceAccountToken": False,
        # With service links, a Service called triptych would set TRIPTYCH_* variables.
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": plan.stop_s,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
        "volumes": _volumes(plan),
    }
    if plan.gpus:
        spec["tolerations"] = [{"key": GPU, "operator": "Exists", "effect": "NoSchedule"}]
    return {"metadata": {"labels": _labels(plan, role)}, "spec": spec}


def _server(plan: Plan) -> Manifest:
    ready = {"httpGet": {"path": "/readyz", "port": "http"}, "timeoutSeconds": 5}
    alive = {"httpGet": {"path": "/livez", "port": "http"}, "timeoutSeconds": 5}
    return _container(plan, plan.gpus) | {
        "args": plan.command,
        "env": _env(plan.container_environment()) + _api_key(plan),
        "ports": [{"name": "http", "containerPort": plan.settings.port}],
        "startupProbe": ready
        | {"periodSeconds": PROBE_S, "failureThreshold": math.ceil(plan.start_s / PROBE_S)},
        # While a model restarts, the pod is not ready. It must not be killed, so /livez passes.
        "readinessProbe": ready | {"periodSeconds": PROBE_S, "failureThreshold": 1},
        "livenessProbe": alive | {"periodSeconds": PROBE_S, "failureThreshold": 3},
        "lifecycle": {"preStop": {"sleep": {"seconds": PRE_STOP_S}}},
    }


def _rank_container(plan: Plan, variables: dict[str, str]) -> Manifest:
    """The container of a node that runs ranks only.

    `cli.join` exits when it cannot continue, and Kubernetes starts it again.
    """
    [model] = (m for m in plan.models if nodes_of(m.config) > 1)
    env = plan.container_environment() | variables
    if not plan.options.model_volume:
        env[variable(model.field)] = f"{BENTO_PATH}/models/{model.choice.replace(':', '/')}"
    node_rank = {
        "name": f"{PREFIX}NODE_RANK",
        "valueFrom": {"fieldRef": {"fieldPath": POD_INDEX}},
    }
    return _container(plan, model.config.requested_gpus) | {
        # The server needs these ranks until its last request has ended.
        "args": ["python", "-m", "cli.join", "--drain", str(PRE_STOP_S + plan.drain_s)],
        "workingDir": f"{BENTO_PATH}/src",
        "env": [*_env(env), node_rank],
    }


def _container(plan: Plan, gpus: int) -> Manifest:
    memory, gpu_limit = f"{plan.memory_gib}Gi", {GPU: str(gpus)} if gpus else {}
    mounts: list[Manifest] = [
        {"name": "home", "mountPath": HOME},
        {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108 - a volume of the pod
        {"name": "shm", "mountPath": "/dev/shm"},  # noqa: S108 - for NCCL and shared collectives
    ]
    if plan.options.model_volume:
        mounts.append({"name": "models", "mountPath": MODELS, "readOnly": True})
    return {
        "name": "triptych",
        "image": plan.image,
        "resources": {
            "requests": {"cpu": str(plan.cpus), "memory": memory} | gpu_limit,
            # The KV cache on a CPU is sized by the container's limit instead of the machine.
            "limits": {"memory": memory} | gpu_limit,
        },
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        },
        "volumeMounts": mounts,
    }


def _volumes(plan: Plan) -> list[Manifest]:
    shm = {"medium": "Memory", "sizeLimit": f"{plan.shm_gib * GIB // 2**20}Mi"}
    volumes: list[Manifest] = [
        {"name": "home", "emptyDir": {}},
        {"name": "tmp", "emptyDir": {}},
        {"name": "shm", "emptyDir": shm},
    ]
    if claim := plan.options.model_volume:
        source = {"claimName": claim, "readOnly": True}
        volumes.append({"name": "models", "persistentVolumeClaim": source})
    return volumes


def _env(variables: dict[str, str]) -> list[Manifest]:
    return [{"name": name, "value": value} for name, value in sorted(variables.items())]


def _api_key(plan: Plan) -> list[Manifest]:
    if not (secret := plan.options.api_key_secret):
        return []
    source = {"secretKeyRef": {"name": secret, "key": "api-key"}}
    return [{"name": f"{PREFIX}API_KEY", "valueFrom": source}]


def _autoscaling(plan: Plan) -> list[Manifest]:
    """What scales the Deployment; empty if its size is fixed."""
    if plan.max_replicas == plan.options.replicas:
        return []
    scaler = _keda(plan) if plan.options.autoscaler == "keda" else _hpa(plan)
    return [_pod_monitor(plan), scaler]


def _pod_monitor(plan: Plan) -> Manifest:
    endpoint: Manifest = {"port": "http", "path": "/metrics", "interval": "15s"}
    if secret := plan.options.api_key_secret:
        credentials = {"name": secret, "key": "api-key"}
        endpoint["authorization"] = {"type": "Bearer", "credentials": credentials}
    spec = {"selector": {"matchLabels": _labels(plan)}, "podMetricsEndpoints": [endpoint]}
    return _manifest(plan, "PodMonitor", "monitoring.coreos.com/v1", spec)


def _keda(plan: Plan) -> Manifest:
    spec = {
        "scaleTargetRef": {"name": plan.options.name},
        "minReplicaCount": plan.options.replicas,
        "maxReplicaCount": plan.max_replicas,
        "advanced": {"horizontalPodAutoscalerConfig": {"behavior": _behavior()}},
        "triggers": [_trigger(plan, *target) for target in _targets(plan)],
    }
    return _manifest(plan, "ScaledObject", "keda.sh/v1alpha1", spec)


def _trigger(plan: Plan, model: str, target: int) -> Manifest:
    matchers = {"namespace": plan.options.namespace, "model": model}
    selectors = [f"{key}={json.dumps(value)}" for key, value in matchers.items()]
    # Anchored at both suffixes: another deployment's name may begin with this one.
    selectors.append(f'pod=~"{plan.options.name}-[a-z0-9]+-[a-z0-9]+"')
    return {
        "type": "prometheus",
        "metricType": "AverageValue",
        "metadata": {
            "serverAddress": plan.options.prometheus,
            "query": f"sum({METRIC}{{{','.join(selectors)}}})",
            "threshold": str(target),
        },
    }


def _hpa(plan: Plan) -> Manifest:
    metrics = [
        {
            "type": "Pods",
            "pods": {
                "metric": {"name": METRIC, "selector": {"matchLabels": {"model": model}}},
                "target": {"type": "AverageValue", "averageValue": str(target)},
            },
        }
        for model, target in _targets(plan)
    ]
    deployment = {"apiVersion": "apps/v1", "kind": "Deployment", "name": plan.options.name}
    spec = {
        "scaleTargetRef": deployment,
        "minReplicas": plan.options.replicas,
        "maxReplicas": plan.max_replicas,
        "metrics": metrics,
        "behavior": _behavior(),
    }
    return _manifest(plan, "HorizontalPodAutoscaler", "autoscaling/v2", spec)


def _behavior() -> Manifest:
    return {"scaleDown": {"stabilizationWindowSeconds": SCALE_DOWN_S}}


def _targets(plan: Plan) -> list[tuple[str, int]]:
    """Name of each model, and how many of its requests a replica computes at once."""
    return [(model.config.name, model.config.max_concurrency) for model in plan.models]
