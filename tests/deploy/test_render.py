"""Rendered manifests: they match the schemas of what reads them, and have what the models need."""

from __future__ import annotations

import itertools
import json
import math
import re
import shlex
import struct
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.conftest import Home, Render
from tests.support.manifests import check_compose, check_kubernetes, check_ray
from tests.support.server import ROOT

NODES = {
    "TRIPTYCH_NNODES": "2",
    "TRIPTYCH_TENSOR_PARALLEL": "4",
    "TRIPTYCH_TEXT_ENGINE": "deepspeed",
}


def pod(manifest: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """A pod's spec, its container, and the container's variables."""
    spec = manifest["spec"]["template"]["spec"]
    [container] = spec["containers"]
    env = {e["name"]: e.get("value", e.get("valueFrom")) for e in container["env"]}
    return spec, container, env


def test_kubernetes(render: Render, store: Home) -> None:
    text = render("kubernetes", "--bento", store.bento, "--image", "registry.example/triptych:1")
    manifests = check_kubernetes(text)
    assert set(manifests) == {"Service", "Deployment", "PodDisruptionBudget"}
    spec, container, env = pod(manifests["Deployment"])
    # The split text model's two ranks and the image model's one.
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "3"
    assert container["image"] == "registry.example/triptych:1"
    # The slowest model's start_timeout, and the request_timeout of the longest stream.
    probe = container["startupProbe"]
    assert probe["httpGet"]["path"] == "/readyz"
    assert probe["periodSeconds"] * probe["failureThreshold"] > 900
    assert container["readinessProbe"]["httpGet"]["path"] == "/readyz"
    assert container["livenessProbe"]["httpGet"]["path"] == "/livez"
    drained = int(container["args"][-1])
    assert spec["terminationGracePeriodSeconds"] > drained + 10 > 600
    shm = next(v for v in spec["volumes"] if v["name"] == "shm")
    assert shm["emptyDir"] == {"medium": "Memory", "sizeLimit": "2048Mi"}
    assert spec["securityContext"]["runAsNonRoot"]
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert not spec["enableServiceLinks"]
    assert not [name for name in env if name.startswith("TRIPTYCH_")]
    assert env["MAX_JOBS"] == container["resources"]["requests"]["cpu"]
    deployment = manifests["Deployment"]["spec"]
    assert deployment["replicas"] == 1
    # A start within start_timeout is not a failed rollout.
    allowed = spec["terminationGracePeriodSeconds"] + 900
    assert deployment["progressDeadlineSeconds"] > allowed
    assert deployment["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
    assert "sessionAffinity" not in manifests["Service"]["spec"]


def test_an_update_without_surge_stops_a_replica_first(render: Render, store: Home) -> None:
    manifests = check_kubernetes(render("kubernetes", "--bento", store.bento, "--no-surge"))
    update = manifests["Deployment"]["spec"]["strategy"]["rollingUpdate"]
    assert update == {"maxSurge": 0, "maxUnavailable": 1}


def test_settings_made_here_apply_to_the_deployment(render: Render, store: Home) -> None:
    set_here = {
        "TRIPTYCH_REQUEST_TIMEOUT": "7200",
        "TRIPTYCH_START_TIMEOUT": "1800",
        "TRIPTYCH_MAX_BATCH_SIZE": "5",
        "TRIPTYCH_CPU_KERNELS": "false",
        "PORT": "8080",
    }
    text = render("kubernetes", "--bento", store.bento, "--max-replicas", "3", **set_here)
    manifests = check_kubernetes(text)
    spec, container, env = pod(manifests["Deployment"])
    assert spec["terminationGracePeriodSeconds"] > 7200
    assert 10 * container["startupProbe"]["failureThreshold"] > 1800
    assert container["ports"] == [{"name": "http", "containerPort": 8080}]
    assert {k: v for k, v in env.items() if k.startswith(("TRIPTYCH_", "PORT"))} == {
        **set_here,
        "TRIPTYCH_REQUEST_TIMEOUT": "7200.0",
        "TRIPTYCH_START_TIMEOUT": "1800.0",
    }
    thresholds = [t["metadata"]["threshold"] for t in manifests["ScaledObject"]["spec"]["triggers"]]
    assert thresholds == ["5", "4"]


@pytest.mark.parametrize("scaler", ["keda", "hpa"])
def test_scaling_by_admitted_requests(render: Render, store: Home, scaler: str) -> None:
    options = ["--replicas", "2", "--max-replicas", "5", "--autoscaler", scaler]
    key = ["--api-key-secret", "door"]
    manifests = check_kubernetes(render("kubernetes", "--bento", store.bento, *options, *key))
    assert "replicas" not in manifests["Deployment"]["spec"]
    # A job is looked up at the replica that accepted it.
    assert manifests["Service"]["spec"]["sessionAffinity"] == "ClientIP"
    [common] = {str(manifest["metadata"]["labels"]) for manifest in manifests.values()}
    assert "'app.kubernetes.io/instance': 'triptych'" in common
    [endpoint] = manifests["PodMonitor"]["spec"]["podMetricsEndpoints"]
    secret = {"name": "door", "key": "api-key"}
    assert endpoint["authorization"]["credentials"] == secret
    _, _, env = pod(manifests["Deployment"])
    assert env["TRIPTYCH_API_KEY"] == {"secretKeyRef": secret}
    selected = manifests["PodMonitor"]["spec"]["selector"]["matchLabels"]
    assert (
        selected.items()
        <= manifests["Deployment"]["spec"]["template"]["metadata"]["labels"].items()
    )
    if scaler == "keda":
        spec = manifests["ScaledObject"]["spec"]
        assert (spec["minReplicaCount"], spec["maxReplicaCount"]) == (2, 5)
        triggers = [t["metadata"] for t in spec["triggers"]]
        assert [t["threshold"] for t in triggers] == ["8", "4"]
        for model, trigger in zip(("split", "diffusion"), triggers, strict=True):
            assert trigger["query"].startswith("sum(triptych_admitted_sequences{")
            assert f'model="{model}"' in trigger["query"]
            pods = re.search(r'pod=~"([^"]+)"', trigger["query"])
            assert pods is not None
            assert re.fullmatch(pods[1], "triptych-7d9c5b8f6c-x2x9z")
            assert not re.fullmatch(pods[1], "triptych-second-7d9c5b8f6c-x2x9z")
    else:
        spec = manifests["HorizontalPodAutoscaler"]["spec"]
        assert (spec["minReplicas"], spec["maxReplicas"]) == (2, 5)
        metrics = [m["pods"] for m in spec["metrics"]]
        assert [m["target"]["averageValue"] for m in metrics] == ["8", "4"]
        names = [m["metric"]["selector"]["matchLabels"]["model"] for m in metrics]
        assert names == ["split", "diffusion"]


def test_models_on_a_volume_and_on_cpus(render: Render, store: Home) -> None:
    options = ["--text-model", "plain", "--model-volume", "weights", "--image", "t:1"]
    manifests = check_kubernetes(render("kubernetes", *options, "--cpus", "5", "--memory", "9"))
    spec, container, env = pod(manifests["Deployment"])
    assert "nvidia.com/gpu" not in container["resources"]["limits"]
    assert "tolerations" not in spec
    assert container["resources"]["requests"] == {"cpu": "5", "memory": "9Gi"}
    # A container sees all cores of the machine, so the number of threads is set.
    assert env["TRIPTYCH_NUM_THREADS"] == "4"
    assert env["TRIPTYCH_TEXT_MODEL"] == "/models/plain"
    mount = {"name": "models", "mountPath": "/models", "readOnly": True}
    assert mount in container["volumeMounts"]
    claim = {"claimName": "weights", "readOnly": True}
    assert {"name": "models", "persistentVolumeClaim": claim} in spec["volumes"]


HALF = 2**30
"""Parameters, which take 2 GiB in half precision."""


@pytest.mark.parametrize(
    ("setup", "gib"),
    [
        ({"gpus": 1}, 2),
        # A CPU computes it in float32.
        ({"gpus": 0}, 4),
        ({"gpus": 0, "dtype": "bfloat16"}, 4),
        ({"gpus": 2, "engine": "deepspeed", "tensor_parallel": 2}, 2),
        ({"gpus": 3, "engine": "mii", "mii": {"mode": "persistent", "replica_num": 3}}, 6),
    ],
)
def test_memory_covers_each_copy_of_the_weights(
    render: Render, tmp_path: Path, setup: dict[str, Any], gib: int
) -> None:
    model = tmp_path / "halves"
    model.mkdir()
    (model / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (model / "setup_config.json").write_text(json.dumps(setup))
    weights = {"w": {"dtype": "BF16", "shape": [HALF], "data_offsets": [0, 2 * HALF]}}
    header = json.dumps(weights).encode()
    with (model / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + 2 * HALF)
    options = ["--text-model", str(model), "--model-volume", "v", "--image", "t:1"]
    service = yaml.safe_load(render("compose", *options))["services"]["triptych"]
    memory = int(service["deploy"]["resources"]["limits"]["memory"].rstrip("g"))
    ranks = 1 + 3 * ("mii" in setup) + ("tensor_parallel" in setup)
    shared = int(service["shm_size"].rstrip("g"))
    assert memory == 1 + 2 * ranks + math.ceil(1.25 * gib + 0.01) + shared


def test_a_model_on_cpus_next_to_one_on_gpus_has_its_threads_set(
    render: Render, store: Home
) -> None:
    options = ["--text-model", "plain", "--image-model", "diffusion", "--model-volume", "v"]
    service = yaml.safe_load(render("compose", *options, "--image", "t:1"))["services"]["triptych"]
    assert service["environment"]["TRIPTYCH_NUM_THREADS"] == "1"
    assert service["deploy"]["resources"]["reservations"]["devices"][0]["count"] == 1


def test_a_model_over_several_nodes(render: Render, store: Home) -> None:
    manifests = check_kubernetes(render("kubernetes", "--bento", store.bento, **NODES))
    assert set(manifests) == {
        *("Service", "Service/nodes", "NetworkPolicy", "PodDisruptionBudget"),
        *("StatefulSet", "StatefulSet/ranks"),
    }
    first, others = manifests["StatefulSet"], manifests["StatefulSet/ranks"]
    assert [s["spec"]["replicas"] for s in (first, others)] == [1, 1]
    # The index of a pod is its node rank; node 0 serves.
    assert [s["spec"]["ordinals"]["start"] for s in (first, others)] == [0, 1]
    _, server, server_env = pod(first)
    _, ranks, ranks_env = pod(others)
    assert server["args"][0] == "serve"
    *command, drain = ranks["args"]
    assert command == ["python", "-m", "cli.join", "--drain"]
    grace = others["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert int(server["args"][-1]) < int(drain) < grace
    assert "pod-index" in ranks_env["TRIPTYCH_NODE_RANK"]["fieldRef"]["fieldPath"]
    assert "TRIPTYCH_NODE_RANK" not in server_env
    headless = manifests["Service/nodes"]
    endpoint = f"{first['metadata']['name']}-0.{headless['metadata']['name']}:29400"
    assert server_env["TRIPTYCH_RDZV_ENDPOINT"] == ranks_env["TRIPTYCH_RDZV_ENDPOINT"] == endpoint
    assert headless["spec"]["clusterIP"] == "None"
    assert first["spec"]["serviceName"] == headless["metadata"]["name"]
    # Two of the four ranks on each node, and the image model on the one that serves.
    gpus = [c["resources"]["limits"]["nvidia.com/gpu"] for c in (server, ranks)]
    assert gpus == ["3", "2"]
    frozen = store.split.replace(":", "/")
    assert ranks_env["TRIPTYCH_TEXT_MODEL"] == f"/home/bentoml/bento/models/{frozen}"


def test_compose(render: Render, store: Home, tmp_path: Path) -> None:
    service = check_compose(render("compose", "--bento", store.bento, "--api-key"), tmp_path)
    [device] = service["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["count"]) == ("nvidia", 3)
    assert service["environment"]["TRIPTYCH_API_KEY"] is None
    assert service["shm_size"] == "2g"
    assert int(service["stop_grace_period"].rstrip("s")) > int(service["command"][-1]) > 600
    assert int(service["healthcheck"]["start_period"].rstrip("s")) > 900
    options = ["--text-model", "plain", "--model-volume", "/srv/models", "--image", "t:1"]
    service = check_compose(render("compose", *options), tmp_path)
    assert "reservations" not in service["deploy"]["resources"]
    assert service["volumes"] == ["/srv/models:/models:ro"]
    options[3] = "models"
    text = render("compose", *options)
    assert check_compose(text, tmp_path)["volumes"] == ["models:/models:ro"]
    # Compose would create an empty volume.
    assert yaml.safe_load(text)["volumes"] == {"models": {"external": True}}


def test_run(render: Render, store: Home) -> None:
    text = render("run", "--bento", store.bento, "--api-key")
    words = shlex.split(text)
    assert words[:3] == ["docker", "run", "--rm"]
    options = dict(itertools.pairwise(words))
    assert (options["--gpus"], options["--shm-size"]) == ("3", "2g")
    assert int(options["--stop-timeout"]) > int(words[-1]) > 600
    # `bentoml containerize` names the image after the bento.
    assert words[-4:-1] == [store.bento, "serve", "--timeout-graceful-shutdown"]
    assert render("run", "--bento", "triptych:latest", "--api-key") == text
    assert words[words.index("TRIPTYCH_API_KEY") - 1] == "--env"


def test_ray(render: Render, store: Home) -> None:
    options = ["--text-model", store.split, "--image-model", store.image]
    application = check_ray(render("ray", *options, TRIPTYCH_MAX_QUEUE="100"))
    [deployment] = application["deployments"]
    assert deployment["ray_actor_options"]["num_gpus"] == 3
    assert deployment["num_replicas"] == 1
    assert "max_ongoing_requests" not in deployment
    assert deployment["graceful_shutdown_timeout_s"] > 600
    assert application["runtime_env"]["env_vars"] == {
        "TRIPTYCH_IMAGE_MODEL": store.image,
        "TRIPTYCH_MAX_QUEUE": "100",
        "TRIPTYCH_TEXT_MODEL": store.split,
    }
    application = check_ray(render("ray", *options, "--max-replicas", "4"))
    scaling = application["deployments"][0]["autoscaling_config"]
    assert (scaling["max_replicas"], scaling["target_ongoing_requests"]) == (4, 12)


def test_bentocloud(render: Render, store: Home) -> None:
    options = ["--bento", store.bento, "--api-key-secret", "door", "--instance-type", "gpu.big"]
    config = yaml.safe_load(render("bentocloud", *options, TRIPTYCH_MAX_QUEUE="9", PORT="8080"))
    service = config["services"]["triptych"]
    assert service["instance_type"] == "gpu.big"
    assert config["secrets"] == ["door"]
    assert config["envs"] == [{"name": "TRIPTYCH_MAX_QUEUE", "value": "9"}]
    # The bento has the resources of its models; the file has those that settings change.
    assert "config_overrides" not in service
    changed = {"TRIPTYCH_MAX_BATCH_SIZE": "20", "TRIPTYCH_TENSOR_PARALLEL": "4"}
    changed["TRIPTYCH_REQUEST_TIMEOUT"] = "7200"
    config = yaml.safe_load(render("bentocloud", *options, **changed))
    overrides = config["services"]["triptych"]["config_overrides"]
    assert overrides["resources"] == {"gpu": 5}
    assert overrides["traffic"]["concurrency"] == 24
    assert overrides["traffic"]["timeout"] > 7200


def test_the_file_for_bentocloud_is_what_is_rendered(render: Render, store: Home) -> None:
    assert yaml.safe_load((ROOT / "deploy/bentocloud.yaml").read_text()) == yaml.safe_load(
        render("bentocloud", "--bento", "triptych:latest")
    )


REFUSED: list[tuple[list[str], dict[str, str], str]] = [
    (["kubernetes"], {}, "no model is chosen"),
    (["kubernetes", "--bento", "triptych:none"], {}, "its bentos are: triptych:"),
    (["kubernetes", "--text-model", "nothing"], {}, "neither a folder nor a tag"),
    (["kubernetes", "--text-model", "plain"], {}, "the deployment has no models"),
    (["kubernetes", "--text-model", "plain", "--model-volume", "v"], {}, "--image is needed"),
    (["compose", "--text-model", "plain"], {}, "the deployment has no models"),
    (
        ["ray", "--text-model", "plain", "--replicas", "3", "--max-replicas", "2"],
        {},
        "not be below",
    ),
    (["kubernetes", "--bento", "B"], {"TRIPTYCH_API_KEY": "k"}, "--api-key-secret"),
    (["compose", "--bento", "B"], {"TRIPTYCH_API_KEY": "k"}, "--api-key,"),
    (["ray", "--text-model", "plain"], {"TRIPTYCH_API_KEY": "k"}, "machines are started"),
    (["run", "--bento", "B", "--text-model", "plain"], {}, "leave out --bento"),
    (["ray", "--text-model", "diffusion"], {}, "choose it with TRIPTYCH_IMAGE_MODEL"),
    (["ray", "--text-model", "plain"], {"TRIPTYCH_MAX_QUEUE": "x"}, "TRIPTYCH_MAX_QUEUE"),
    (["bentocloud", "--bento", "B", "--replicas", "2"], NODES, "on one"),
    (["ray", "--text-model", "split"], NODES, "on one"),
    (["compose", "--bento", "B"], NODES, "or choose kubernetes"),
    (["run", "--bento", "B"], NODES, "or choose kubernetes"),
    (["kubernetes", "--bento", "B", "--max-replicas", "2"], NODES, "another --name"),
]


@pytest.mark.parametrize(("arguments", "variables", "words"), REFUSED)
def test_an_impossible_deployment_is_refused_in_one_sentence(
    render: Render, store: Home, arguments: list[str], variables: dict[str, str], words: str
) -> None:
    arguments = [store.bento if each == "B" else each for each in arguments]
    [sentence] = render(*arguments, **variables).splitlines()
    assert sentence.startswith("error: ")
    assert words in sentence


def test_bad_usage_is_an_error(render: Render) -> None:
    for wrong in (["--name", "A_b"], ["--replicas", "0"], ["--max-replicas", "many"]):
        with pytest.raises(SystemExit, match="2"):
            render("kubernetes", *wrong)
