"""`/models` and `/ping`: what TorchServe's management API says of the models there are.

Fields that would say nothing here (`maxBatchDelay` apart, which is 0: nothing waits for a batch)
are left out, such as the memory and the process id of a worker.
"""

from __future__ import annotations

from typing import Any

from api.http.context import current_request
from api.models.images import ImageModel
from api.models.served import Served
from api.models.tasks import TaskModel
from api.models.text import TextModel
from runners.contracts.errors import ModelNotServed, ModelVersionNotServed
from runners.contracts.runner import RunnerState

Model = TextModel | TaskModel | ImageModel


def find(served: Served, name: str, version: str | None = None) -> Model:
    """The model of this name, in this version if one is named.

    The store has names in lower case; archives and their clients may not.

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


def is_healthy(served: Served) -> bool:
    """False once a model is given up; while one loads or comes back the server is well."""
    given_up = (RunnerState.FAILED, RunnerState.STOPPED)
    return all(model.runner.health().state not in given_up for model in served.models)


def list_models(served: Served) -> dict[str, Any]:
    """All models. `modelUrl` is what a model was chosen by: its name."""
    names = sorted(model.name for model in served.models)
    return {"models": [{"modelName": name, "modelUrl": name} for name in names]}


def describe(model: Model) -> dict[str, Any]:
    """A model's state. Its ranks are one worker, which holds the whole of it."""
    runner, admission, health = model.runner, model.admission, model.runner.health()
    worker = {
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
        "responseTimeout": int(current_request().timeout),
        "loadedAtStartup": True,
        "workers": [worker],
        "jobQueueStatus": {
            "remainingCapacity": admission.limit - admission.inside,
            "pendingRequests": health.waiting,
        },
    }
