"""`/models` and `/ping`: the served models in the format of TorchServe's management API.

Fields without a meaning here, such as the memory and the process id of a worker, are left out.
`maxBatchDelay` is 0, because no request waits for a batch to fill. `responseTimeout` is that of
`model-config.yaml`: the time after which a worker that does not answer is replaced.
"""

from __future__ import annotations

import math
from typing import Literal

from typing_extensions import TypedDict

from api.models.images import ImageModel
from api.models.served import ServedModels
from api.models.tasks import TaskModel
from api.models.text import TextModel
from runners.contracts.errors import ModelNotServed, ModelVersionNotServed
from runners.contracts.runner import RunnerState

Model = TextModel | TaskModel | ImageModel


class ModelEntry(TypedDict):
    """A model of the list."""

    modelName: str
    modelUrl: str


class ModelList(TypedDict):
    """All models."""

    models: list[ModelEntry]


class Worker(TypedDict):
    """A rank group."""

    id: str
    status: Literal["READY", "UNLOADING"]
    gpu: bool


class JobQueue(TypedDict):
    """A model's queue."""

    remainingCapacity: int
    pendingRequests: int


class ModelState(TypedDict):
    """A model's state."""

    modelName: str
    modelVersion: str
    modelUrl: str
    runtime: Literal["python"]
    minWorkers: int
    maxWorkers: int
    batchSize: int
    maxBatchDelay: int
    responseTimeout: int
    """In seconds."""
    loadedAtStartup: bool
    workers: list[Worker]
    jobQueueStatus: JobQueue


def find(served: ServedModels, name: str, version: str | None = None) -> Model:
    """The model with a name, and with a version if one is named.

    Case is ignored: names in the store are in lower case, those of archives may not be.

    Raises: ModelNotServed, ModelVersionNotServed.
    """
    for model in served.models:
        if model.name.lower() == name.lower():
            if version not in (None, model.runner.version):
                raise ModelVersionNotServed(
                    f"Model version: {version[:100]} does not exist for model: {name[:100]}"
                )
            return model
    raise ModelNotServed(f"Model not found: {name[:100]}")


def is_healthy(served: ServedModels) -> bool:
    """False once a model will not be served again; true while one loads or restarts."""
    final = (RunnerState.FAILED, RunnerState.STOPPED)
    return all(model.runner.health().state not in final for model in served.models)


def list_models(served: ServedModels) -> ModelList:
    """All models; `modelUrl` is the model's name, too."""
    names = sorted(model.name for model in served.models)
    return {"models": [{"modelName": name, "modelUrl": name} for name in names]}


def describe(model: Model) -> ModelState:
    """A model's state. Its rank group counts as one worker."""
    runner, admission, health = model.runner, model.admission, model.runner.health()
    worker: Worker = {
        "id": "0",
        "status": "READY" if health.ready else "UNLOADING",
        "gpu": any(device.startswith("cuda") for device in runner.devices),
    }
    return {
        "modelName": model.name,
        "modelVersion": runner.version,
        "modelUrl": model.name,
        "runtime": "python",
        "minWorkers": 1,
        "maxWorkers": 1,
        "batchSize": runner.max_concurrency,
        "maxBatchDelay": 0,
        "responseTimeout": math.ceil(runner.step_timeout),
        "loadedAtStartup": True,
        "workers": [worker],
        "jobQueueStatus": {
            "remainingCapacity": admission.limit - admission.admitted,
            "pendingRequests": health.waiting,
        },
    }
