"""Kubernetes: a Deployment that scales by what waits, or, over several machines, StatefulSets.

A replica on several machines is one pod on each: the first serves, the others hold their ranks
(`cli.join`), and each knows by its index which of them it is.
"""

from __future__ import annotations

import math

from deploy.manifests import HOLDS, SERVES, Manifest, labels, manifest
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
    rendezvous,
)
from deploy.scaling import autoscaler
from runners.contracts.errors import ConfigError
from settings import PREFIX, variable

GPU = "nvidia.com/gpu"
INDEX = "metadata.labels['apps.kubernetes.io/pod-index']"
PROBE_S = 10


def manifests(plan: Plan) -> list[Manifest]:
    """Everything to `kubectl apply`. Raises: ConfigError for what can not be."""
    plan.refuse_without_models("the claim of a volume")
    if plan.nnodes == 1:
        return [_service(plan), _deployment(plan), _budget(plan), *autoscaler(plan)]
    if plan.max_replicas > 1:
        raise ConfigError(
            f"a model over {plan.nnodes} machines is one replica: for more, render it again under "
            "another --name"
        )
    return [_service(plan), _nodes(plan), _policy(plan), *_node_sets(plan), _budget(plan)]


def _service(plan: Plan) -> Manifest:
    spec: Manifest = {
        "selector": labels(plan),
        "ports": [{"name": "http", "port": 80, "targetPort": "http"}],
    }
    if plan.spreads_tasks:
        # Whoever submitted a task asks for it where it is.
        spec["sessionAffinity"] = "ClientIP"
    return manifest(plan, "Service", "v1", spec)


def _deployment(plan: Plan) -> Manifest:
    more, fewer = (1, 0) if plan.options.surge else (0, 1)
    spec = {
        "replicas": plan.options.replicas,
        "selector": {"matchLabels": labels(plan)},
        "strategy": {"rollingUpdate": {"maxSurge": more, "maxUnavailable": fewer}},
        # Kubernetes' own would call a start that is allowed a failure.
        "progressDeadlineSeconds": plan.start_s + plan.stop_s + START_MARGIN_S,
        "template": _template(plan, SERVES, _server(plan)),
    }
    if plan.max_replicas > plan.options.replicas:
        del spec["replicas"]  # or each apply would undo what the autoscaler did
    return manifest(plan, "Deployment", "apps/v1", spec)


def _budget(plan: Plan) -> Manifest:
    # One at a time may be moved; `minAvailable` of one replica would never let its machine go.
    spec = {"maxUnavailable": 1, "selector": {"matchLabels": labels(plan, None)}}
    return manifest(plan, "PodDisruptionBudget", "policy/v1", spec)


def _nodes(plan: Plan) -> Manifest:
    spec = {
        "clusterIP": "None",
        "publishNotReadyAddresses": True,  # they meet before any of them is ready
        "selector": labels(plan, None),
        "ports": [{"name": "rendezvous", "port": RENDEZVOUS_PORT}],
    }
    return manifest(plan, "Service", "v1", spec, suffix="-nodes")


def _policy(plan: Plan) -> Manifest:
    """What ranks tell each other is neither encrypted nor asked for a password."""
    each_other = {"from": [{"podSelector": {"matchLabels": labels(plan, None)}}]}
    spec = {
        "podSelector": {"matchLabels": labels(plan, None)},
        "policyTypes": ["Ingress"],
        "ingress": [each_other, {"ports": [{"port": "http"}]}],
    }
    return manifest(plan, "NetworkPolicy", "networking.k8s.io/v1", spec)


def _node_sets(plan: Plan) -> list[Manifest]:
    meeting = {
        f"{PREFIX}NNODES": str(plan.nnodes),
        f"{PREFIX}RDZV_ENDPOINT": rendezvous(plan.options.name),
    }
    server = _server(plan)
    server["env"] = _env(plan.container_environment() | meeting) + _key(plan)
    return [
        _node_set(plan, SERVES, server, count=1, first=0),
        _node_set(plan, HOLDS, _joining(plan, meeting), count=plan.nnodes - 1, first=1),
    ]


def _node_set(plan: Plan, role: str, container: Manifest, *, count: int, first: int) -> Manifest:
    spec = {
        "serviceName": f"{plan.options.name}-nodes",
        "replicas": count,
        "ordinals": {"start": first},
        "podManagementPolicy": "Parallel",
        "selector": {"matchLabels": labels(plan, role)},
        "template": _template(plan, role, container),
    }
    suffix = "" if role == SERVES else f"-{role}"
    return manifest(plan, "StatefulSet", "apps/v1", spec, suffix=suffix)


def _template(plan: Plan, role: str, container: Manifest) -> Manifest:
    spec: Manifest = {
        "automountServiceAccountToken": False,
        # Else a Service called triptych sets TRIPTYCH_* variables of its own.
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
    return {"metadata": {"labels": labels(plan, role)}, "spec": spec}


def _server(plan: Plan) -> Manifest:
    ready = {"httpGet": {"path": "/readyz", "port": "http"}, "timeoutSeconds": 5}
    alive = {"httpGet": {"path": "/livez", "port": "http"}, "timeoutSeconds": 5}
    return _container(plan, plan.gpus) | {
        "args": plan.command,
        "env": _env(plan.container_environment()) + _key(plan),
        "ports": [{"name": "http", "containerPort": plan.settings.port}],
        "startupProbe": ready
        | {"periodSeconds": PROBE_S, "failureThreshold": math.ceil(plan.start_s / PROBE_S)},
        # A model that comes back by itself is not ready meanwhile, but must not be killed for it.
        "readinessProbe": ready | {"periodSeconds": PROBE_S, "failureThreshold": 1},
        "livenessProbe": alive | {"periodSeconds": PROBE_S, "failureThreshold": 3},
        "lifecycle": {"preStop": {"sleep": {"seconds": PRE_STOP_S}}},
    }


def _joining(plan: Plan, meeting: dict[str, str]) -> Manifest:
    """Of a machine that holds ranks; its process ends if it can not go on, and is started again."""
    [model] = (m for m in plan.models if getattr(m.config, "nnodes", 1) > 1)
    env = plan.container_environment() | meeting
    if not plan.options.model_volume:
        env[variable(model.field)] = f"{BENTO_PATH}/models/{model.choice.replace(':', '/')}"
    index = {"name": f"{PREFIX}NODE_RANK", "valueFrom": {"fieldRef": {"fieldPath": INDEX}}}
    return _container(plan, model.config.requested_gpus) | {
        # The server's last requests need them.
        "args": ["python", "-m", "cli.join", "--drain", str(PRE_STOP_S + plan.drain_s)],
        "workingDir": f"{BENTO_PATH}/src",
        "env": [*_env(env), index],
    }


def _container(plan: Plan, gpus: int) -> Manifest:
    memory, asked = f"{plan.memory_gib}Gi", {GPU: str(gpus)} if gpus else {}
    mounts = [
        {"name": "home", "mountPath": HOME},
        {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108 of its own, in the container
        {"name": "shm", "mountPath": "/dev/shm"},  # noqa: S108
    ]
    if plan.options.model_volume:
        mounts.append({"name": "models", "mountPath": MODELS, "readOnly": True})  # type: ignore[dict-item]
    return {
        "name": "triptych",
        "image": plan.image,
        "resources": {
            "requests": {"cpu": str(plan.cpus), "memory": memory} | asked,
            # With it the KV cache on a CPU is as large as the container allows, not the machine.
            "limits": {"memory": memory} | asked,
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


def _key(plan: Plan) -> list[Manifest]:
    if not (secret := plan.options.api_key_secret):
        return []
    source = {"secretKeyRef": {"name": secret, "key": "api-key"}}
    return [{"name": f"{PREFIX}API_KEY", "valueFrom": source}]
