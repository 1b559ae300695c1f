"""The plan of a deployment: what its nodes have to provide, computed from the models' RunnerConfig.

`deploy.render` makes one plan for each command, and the renderers read it.
"""

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
"""The only writable folder besides /tmp; compiled kernels go there."""
MODELS = "/models"
GIB = 2**30
HALF_BYTES, FLOAT32_BYTES = 2, 4
START_MARGIN_S, DRAIN_MARGIN_S, STOP_MARGIN_S = 60, 30, 30
PRE_STOP_S = 10
"""For how long a load balancer may still send requests to a replica that is being stopped."""
RENDEZVOUS_PORT = 29400

LOCAL_SETTINGS = {"text_model", "image_model", "api_key", "node_rank", "rdzv_endpoint"}
"""Settings that are not passed on: they differ between here and the deployment, or are secret."""

NO_MODEL = (
    "no model is chosen: name a bento that contains one (--bento), or models with --text-model and "
    "--image-model"
)


@dataclass(frozen=True)
class Options:
    """What the operator decides; everything else follows from the models."""

    name: str = "triptych"
    bento: str = ""
    """A bento of the store, whose image contains its models."""
    image: str = ""
    """The image to run. Default: the image named after the bento."""
    model_volume: str = ""
    """The volume with the models' folders, if the image does not contain them."""
    replicas: int = 1
    max_replicas: int | None = None
    """The largest number of replicas when scaling. Default: no scaling."""
    cpus: int | None = None
    memory: int | None = None
    """In GiB."""
    api_key: bool = False
    """Whether the shell's API key is passed through."""
    api_key_secret: str = ""
    """The secret from which the deployment reads its API key."""
    surge: bool = True
    """Whether an update may run one replica more than the deployment has."""
    namespace: str = "default"
    autoscaler: str = "keda"
    prometheus: str = ""
    instance_type: str = ""


@dataclass(frozen=True)
class DeployedModel:
    """A model of the deployment."""

    field: str
    """The setting that chooses it: `text_model` or `image_model`."""
    choice: str
    """A tag of the store or a folder."""
    config: BaseRunnerConfig


@dataclass(frozen=True)
class Plan:
    """What a replica needs, and how long it takes to start and to stop."""

    options: Options
    settings: Settings
    models: tuple[DeployedModel, ...]

    @property
    def nnodes(self) -> int:
        """The number of nodes that a replica is spread over."""
        return max(nodes_of(model.config) for model in self.models)

    @property
    def max_replicas(self) -> int:
        """The largest number of replicas."""
        return self.options.max_replicas or self.options.replicas

    @property
    def splits_jobs(self) -> bool:
        """Whether several replicas may accept image jobs, and each knows only those it accepted."""
        return self.max_replicas > 1 and any(m.field == "image_model" for m in self.models)

    @property
    def gpus(self) -> int:
        """GPUs of the node that serves."""
        return sum(model.config.requested_gpus for model in self.models)

    @property
    def max_concurrency(self) -> int:
        """How many sequences and images a replica computes at once."""
        return sum(model.config.max_concurrency for model in self.models)

    @property
    def ranks(self) -> int:
        """Processes that hold models on the node that serves."""
        return sum(ranks_of(model.config) for model in self.models)

    @property
    def cpus(self) -> int:
        """One core for the server and one for each rank, or a rank's threads if it runs on CPUs."""
        return self.options.cpus or 1 + sum(
            ranks_of(m.config) * (m.config.num_threads or (1 if m.config.requested_gpus else 2))
            for m in self.models
        )

    @property
    def num_threads(self) -> int | None:
        """CPU threads of a rank, or None if all models run on GPUs.

        It has to be set in a container, where a rank sees all cores of the machine.
        """
        if all(model.config.requested_gpus for model in self.models):
            return None
        return self.settings.num_threads or max(1, (self.cpus - 1) // self.ranks)

    @property
    def memory_gib(self) -> int:
        """1 GiB for the server, 2 for each rank, 1.25 times the weights, and /dev/shm."""
        weights = math.ceil(1.25 * self.weight_bytes / GIB)
        return self.options.memory or 1 + 2 * self.ranks + weights + self.shm_gib

    @property
    def shm_gib(self) -> int:
        """Shared memory: 1 GiB for each rank of a model that has several on a node."""
        return max(1, sum(n for m in self.models if (n := ranks_of(m.config)) > 1))

    @cached_property
    def weight_bytes(self) -> int:
        """What the weights of all models take in memory. Raises: IncompleteModel."""
        return sum(copies_of(m.config) * bytes_of(m.config) for m in self.models)

    @property
    def start_s(self) -> int:
        """The longest time from start to ready; the models are loaded at the same time."""
        return math.ceil(max(m.config.start_timeout for m in self.models)) + START_MARGIN_S

    @property
    def drain_s(self) -> int:
        """How long running requests may continue after SIGTERM: as long as the longest stream."""
        return math.ceil(self.settings.request_timeout) + DRAIN_MARGIN_S

    @property
    def stop_s(self) -> int:
        """From the order to stop to SIGKILL: draining, then ending the ranks."""
        return PRE_STOP_S + self.drain_s + STOP_MARGIN_S

    @property
    def command(self) -> list[str]:
        """The arguments of the image's entrypoint."""
        return ["serve", "--timeout-graceful-shutdown", str(self.drain_s)]

    @property
    def image(self) -> str:
        """The image to run; `bentoml containerize` names it after the bento's version.

        Raises: ConfigError if neither an image nor a bento is named.
        """
        if not (self.options.image or self.options.bento):
            raise ConfigError("--image is needed: which image to run")
        return self.options.image or str(bentoml.bentos.get(self.options.bento).tag)

    def require_one_node(self, target: str) -> None:
        """Raises: ConfigError if a replica needs several nodes, which `target` cannot give it."""
        if self.nnodes > 1:
            raise ConfigError(
                f"the model is spread over {self.nnodes} nodes, and {target} runs a replica on "
                f"one: set {PREFIX}NNODES=1, or choose kubernetes"
            )

    def require_models(self, volume: str) -> None:
        """Raises: ConfigError if the models are neither in the image nor on a `volume`."""
        if not (self.options.bento or self.options.model_volume):
            raise ConfigError(
                "the deployment has no models: name a bento that contains them (--bento), or "
                f"{volume} (--model-volume) with one folder for each model, named after it"
            )

    def environment(self) -> dict[str, str]:
        """Variables of a replica: the settings made here, except those of this machine alone."""
        names = self.settings.model_fields_set - LOCAL_SETTINGS
        variables = {variable(name): _text(getattr(self.settings, name)) for name in names}
        return dict(sorted(variables.items()))

    def container_environment(self) -> dict[str, str]:
        """Variables of a replica in a container, which may write to `HOME` and /tmp only."""
        variables = self.environment() | {"HOME": HOME, "BENTOML_HOME": f"{HOME}/bentoml"}
        if self.options.model_volume:
            variables |= {variable(m.field): f"{MODELS}/{m.config.name}" for m in self.models}
        if (threads := self.num_threads) is not None:
            variables[f"{PREFIX}NUM_THREADS"] = str(threads)
        if self.gpus:
            # The default is one nvcc job for each core of the machine, not of the container.
            variables["MAX_JOBS"] = str(self.cpus)
        return dict(sorted(variables.items()))


def nodes_of(config: BaseRunnerConfig) -> int:
    """How many nodes the ranks of a model are spread over."""
    return config.world_size // config.local_world_size


def bytes_of(config: BaseRunnerConfig) -> int:
    """What one copy of a model's weights takes in memory. Raises: IncompleteModel.

    A CPU computes in float32: 16-bit weights take twice the memory where it has no kernels.
    """
    widened = not config.requested_gpus
    total = 0
    for file in config.model_path.rglob("*.safetensors"):
        parameters = read_header(file, f"{config.name}/{file.name}").parameters
        half = parameters["F16"] + parameters["BF16"]
        total += file.stat().st_size + widened * (FLOAT32_BYTES - HALF_BYTES) * half
    return total


def copies_of(config: BaseRunnerConfig) -> int:
    """How many copies of its weights a model keeps on one node."""
    if config.task == IMAGE_TASK:  # each rank has a copy
        return config.local_world_size
    if isinstance(config, MIITextConfig) and config.mii.mode == "persistent":
        return config.mii.replica_num if config.mii.host is None else 0
    return 1


def ranks_of(config: BaseRunnerConfig) -> int:
    """Processes that hold a model on one node, those of an MII deployment included."""
    if isinstance(config, MIITextConfig) and config.mii.mode == "persistent":
        local = config.mii.host is None
        return 1 + config.tensor_parallel * config.mii.replica_num * local
    return config.local_world_size


def make_plan(options: Options, settings: Settings) -> Plan:
    """The plan for the bento's models, or for those of the settings if no bento is named.

    Raises: ConfigError, one sentence for the operator.
    """
    if options.max_replicas is not None and options.max_replicas < options.replicas:
        raise ConfigError("--max-replicas must not be below --replicas")
    choices = {"text_model": settings.text_model, "image_model": settings.image_model}
    if options.bento:
        choices = _models_in_bento(options.bento)
    if not any(choices.values()):
        raise ConfigError(NO_MODEL)
    configs = chosen_configs(choices["text_model"], choices["image_model"], settings)
    models = {f"{kind}_model": config for kind, config in configs.items()}
    return Plan(
        options,
        settings,
        tuple(DeployedModel(field, choices[field], config) for field, config in models.items()),
    )


def _models_in_bento(tag: str) -> dict[str, str]:
    """The tags of the models recorded in a bento. Raises: ConfigError."""
    try:
        bento: Bento = bentoml.bentos.get(tag)
    except (BentoMLException, ValueError):
        stored = ", ".join(sorted(str(b.tag) for b in bentoml.bentos.list())) or "none"
        raise ConfigError(f"the store has no bento {tag}; its bentos are: {stored}") from None
    choices = {}
    for field in ("text_model", "image_model"):
        built = str(bento.info.args.get(field, ""))
        choices[field] = frozen_tag(bento, built)
        if built and not choices[field]:
            raise ConfigError(
                f"{tag} was built with the folder {built}, which it does not contain: leave out "
                "--bento, name its image with --image, and the volume that has the folder with "
                "--model-volume"
            )
    return choices


def rendezvous(name: str) -> str:
    """`host:port` of node 0, as the pods of the other nodes reach it."""
    return f"{name}-0.{name}-nodes:{RENDEZVOUS_PORT}"


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
