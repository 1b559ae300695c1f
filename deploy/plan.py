"""The plan of a deployment: what its machines have to give, from the models' RunnerConfig."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import bentoml
from bentoml.exceptions import BentoMLException

from model_choice import chosen_configs, frozen_tag
from runners.config.base import BaseRunnerConfig
from runners.config.model import MIITextConfig
from runners.contracts.errors import ConfigError
from runners.contracts.tasks import IMAGE_TASK
from runners.hf.weights import read_header
from settings import PREFIX, Settings, variable

if TYPE_CHECKING:
    from bentoml import Bento

BENTO_PATH = "/home/bentoml/bento"
"""Where BentoML puts a bento in its image."""
USER = 1034
"""The user that BentoML's images run as."""
HOME = "/home/triptych"
"""What is written while serving, compiled kernels mostly, lies here or in /tmp; all else is
read-only."""
MODELS = "/models"
GIB = 2**30
HALF, FULL = 2, 4
"""Bytes of a half-precision number, and of what most CPUs compute it in."""
START_MARGIN_S, DRAIN_MARGIN_S, STOP_MARGIN_S = 60, 30, 30
PRE_STOP_S = 10
"""How long a load balancer may go on to send requests to what is being stopped."""
RENDEZVOUS_PORT = 29400

NOT_HANDED_ON = {"text_model", "image_model", "api_key", "node_rank", "rdzv_endpoint"}
"""Settings that differ between here and there, or are secret."""

NO_MODEL = (
    "no model is chosen: name a bento that has one (--bento), or models with --text-model and "
    "--image-model"
)


@dataclass(frozen=True)
class Options:
    """What the operator decides; all else follows from the models."""

    name: str = "triptych"
    bento: str = ""
    """A bento of the store, whose image has its models in it."""
    image: str = ""
    """The image to run. Default: named like the bento."""
    model_volume: str = ""
    """Where the models' folders lie, if not in the image."""
    replicas: int = 1
    max_replicas: int | None = None
    """Up to how many it scales. Default: it does not."""
    cpus: int | None = None
    memory: int | None = None
    """In GiB."""
    api_key: bool = False
    """Whether the shell's key is handed through."""
    api_key_secret: str = ""
    """Where the deployment finds its key."""
    surge: bool = True
    """Whether an update may take one replica more than there are."""
    namespace: str = "default"
    autoscaler: str = "keda"
    prometheus: str = ""
    instance_type: str = ""


@dataclass(frozen=True)
class Chosen:
    """A model of the deployment."""

    field: str
    """The setting that chooses it: `text_model` or `image_model`."""
    choice: str
    """A tag of the store or a folder."""
    config: BaseRunnerConfig


@dataclass(frozen=True)
class Plan:
    """What a replica needs, and how long it takes to come and to go."""

    options: Options
    settings: Settings
    models: tuple[Chosen, ...]

    @property
    def nnodes(self) -> int:
        """Over how many machines a replica is spread."""
        return max(
            model.config.world_size // model.config.local_world_size for model in self.models
        )

    @property
    def max_replicas(self) -> int:
        """Up to how many there are."""
        return self.options.max_replicas or self.options.replicas

    @property
    def spreads_tasks(self) -> bool:
        """Whether there may be several replicas that paint, each knowing its own tasks alone."""
        return self.max_replicas > 1 and any(m.field == "image_model" for m in self.models)

    @property
    def gpus(self) -> int:
        """Of the machine that serves."""
        return sum(model.config.requested_gpus for model in self.models)

    @property
    def places(self) -> int:
        """How many sequences and pictures a replica computes together."""
        return sum(model.config.max_concurrency for model in self.models)

    @property
    def ranks(self) -> int:
        """Processes that hold models, on the machine that serves."""
        return sum(ranks_of(model.config) for model in self.models)

    @property
    def cpus(self) -> int:
        """One for the server; for each rank one, or its threads where the CPUs compute."""
        return self.options.cpus or 1 + sum(
            ranks_of(m.config) * (m.config.num_threads or (1 if m.config.requested_gpus else 2))
            for m in self.models
        )

    @property
    def num_threads(self) -> int | None:
        """CPU threads of a rank that has to be told: it sees all cores of the machine."""
        if all(model.config.requested_gpus for model in self.models):
            return None
        return self.settings.num_threads or max(1, (self.cpus - 1) // self.ranks)

    @property
    def memory_gib(self) -> int:
        """1 GiB for the server, 2 for each rank, the weights and a quarter, and /dev/shm."""
        weights = math.ceil(1.25 * self.weight_bytes / GIB)
        return self.options.memory or 1 + 2 * self.ranks + weights + self.shm_gib

    @property
    def shm_gib(self) -> int:
        """Shared memory, which the ranks of a model on one machine talk through: 1 GiB each."""
        return max(1, sum(n for m in self.models if (n := ranks_of(m.config)) > 1))

    @cached_property
    def weight_bytes(self) -> int:
        """What the models' weights take in memory. Raises: IncompleteModel."""
        return sum(copies_of(m.config) * bytes_of(m.config) for m in self.models)

    @property
    def start_s(self) -> int:
        """From start to ready, at most; the models are loaded side by side."""
        return math.ceil(max(m.config.start_timeout for m in self.models)) + START_MARGIN_S

    @property
    def drain_s(self) -> int:
        """How long requests that run may go on: as long as the longest stream."""
        return math.ceil(self.settings.request_timeout) + DRAIN_MARGIN_S

    @property
    def stop_s(self) -> int:
        """From the order to stop to the kill: draining, and ending the ranks."""
        return PRE_STOP_S + self.drain_s + STOP_MARGIN_S

    @property
    def command(self) -> list[str]:
        """What the image's entrypoint is told."""
        return ["serve", "--timeout-graceful-shutdown", str(self.drain_s)]

    @property
    def image(self) -> str:
        """The image to run; `bentoml containerize` names it by the bento's version.

        Raises: ConfigError if nobody says.
        """
        if not (self.options.image or self.options.bento):
            raise ConfigError("--image is needed: which image to run")
        return self.options.image or str(bentoml.bentos.get(self.options.bento).tag)

    def refuse_several_machines(self, what: str) -> None:
        """Raises: ConfigError if `what` would have to run a replica on more than one."""
        if self.nnodes > 1:
            raise ConfigError(
                f"the model is spread over {self.nnodes} machines, and {what} on one: set "
                f"{PREFIX}NNODES=1, or choose kubernetes"
            )

    def refuse_without_models(self, volume: str) -> None:
        """Raises: ConfigError if the models are neither in the image nor on a `volume`."""
        if not (self.options.bento or self.options.model_volume):
            raise ConfigError(
                f"where are the models? Name a bento that has them (--bento), or {volume} "
                "(--model-volume) in which each has a folder of its name"
            )

    def environment(self) -> dict[str, str]:
        """Variables of a replica: what is set here, as far as it means something there."""
        given = self.settings.model_fields_set - NOT_HANDED_ON
        found = {variable(name): _text(getattr(self.settings, name)) for name in given}
        return dict(sorted(found.items()))

    def container_environment(self) -> dict[str, str]:
        """The same, and what a container needs that may write to `HOME` and /tmp alone."""
        found = self.environment() | {"HOME": HOME, "BENTOML_HOME": f"{HOME}/bentoml"}
        if self.options.model_volume:
            found |= {variable(m.field): f"{MODELS}/{m.config.name}" for m in self.models}
        if (threads := self.num_threads) is not None:
            found[f"{PREFIX}NUM_THREADS"] = str(threads)
        if self.gpus:  # nvcc is run by as many jobs as the machine, not the container, has cores
            found["MAX_JOBS"] = str(self.cpus)
        return dict(sorted(found.items()))


def bytes_of(config: BaseRunnerConfig) -> int:
    """What one copy of a model's weights takes in memory. Raises: IncompleteModel.

    On a CPU half precision may be computed in float32 (`dtype`), for which there is room then.
    """
    widened = not config.requested_gpus and config.dtype in ("auto", "float32")
    found = 0
    for file in config.model_path.rglob("*.safetensors"):
        parameters = read_header(file, f"{config.name}/{file.name}").parameters
        half = parameters["F16"] + parameters["BF16"] if widened else 0
        found += file.stat().st_size + (FULL - HALF) * half
    return found


def copies_of(config: BaseRunnerConfig) -> int:
    """How many copies of its weights a model takes on one machine."""
    if config.task == IMAGE_TASK:  # each rank paints with a whole one
        return config.local_world_size
    if isinstance(config, MIITextConfig) and config.mii.mode == "persistent":
        return config.mii.replica_num if config.mii.host is None else 0
    return 1


def ranks_of(config: BaseRunnerConfig) -> int:
    """Processes that hold the model on one machine, those of a deployment of MII's own too."""
    if isinstance(config, MIITextConfig) and config.mii.mode == "persistent":
        here = config.mii.host is None
        return 1 + config.tensor_parallel * config.mii.replica_num * here
    return config.local_world_size


def make_plan(options: Options, settings: Settings) -> Plan:
    """The plan for the bento's models, else those of the settings.

    Raises: ConfigError, one sentence for the operator.
    """
    if options.max_replicas is not None and options.max_replicas < options.replicas:
        raise ConfigError("--max-replicas must not be below --replicas")
    chosen = {f"{kind}_model": getattr(settings, f"{kind}_model") for kind in ("text", "image")}
    if options.bento:
        chosen = _in_bento(options.bento)
    if not any(chosen.values()):
        raise ConfigError(NO_MODEL)
    configs = chosen_configs(chosen["text_model"], chosen["image_model"], settings)
    fields = {f"{kind}_model": config for kind, config in configs.items()}
    return Plan(options, settings, tuple(Chosen(f, chosen[f], c) for f, c in fields.items()))


def _in_bento(tag: str) -> dict[str, str]:
    """The models recorded in a bento. Raises: ConfigError."""
    try:
        bento: Bento = bentoml.bentos.get(tag)
    except (BentoMLException, ValueError):
        stored = ", ".join(sorted(str(b.tag) for b in bentoml.bentos.list())) or "none"
        raise ConfigError(f"{tag} is not a bento of the store; bentos there: {stored}") from None
    chosen = {}
    for field in ("text_model", "image_model"):
        built = str(bento.info.args.get(field, ""))
        chosen[field] = frozen_tag(bento, built)
        if built and not chosen[field]:
            raise ConfigError(
                f"{tag} was built with the folder {built}, which is not in it: leave out --bento, "
                "name its --image, and say with --model-volume where the folder will be"
            )
    return chosen


def rendezvous(name: str) -> str:
    """`host:port` of node 0, as the other machines' pods know it."""
    return f"{name}-0.{name}-nodes:{RENDEZVOUS_PORT}"


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
