"""The plan of a deployment: what its machines have to give, from the models' RunnerConfig."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import bentoml
from bentoml.exceptions import BentoMLException

from model_choice import IMAGE_OVERRIDES, OVERRIDES, is_folder, model_config
from runners.config import BaseRunnerConfig, MIIConfig
from runners.errors import ConfigError
from settings import PREFIX, Settings, variable

BENTO_PATH = "/home/bentoml/bento"
"""Where BentoML puts a bento in its image."""
USER = 1034
"""The user that BentoML's images run as."""
HOME = "/home/triptych"
"""What is written while serving, compiled kernels mostly, lies here or in /tmp; all else is
read-only."""
MODELS = "/models"
GIB = 2**30
START_MARGIN_S, DRAIN_MARGIN_S, STOP_MARGIN_S = 60, 30, 30
PRE_STOP_S = 10
"""How long a load balancer may go on to send requests to what is being stopped."""
RENDEZVOUS_PORT = 29400

NOT_HANDED_ON = {"text_model", "image_model", "api_key", "node_rank", "rdzv_endpoint"}
"""Settings that differ between here and there, or are secret."""


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
    max_replicas: int = 1
    cpus: int | None = None
    memory: int | None = None
    """In GiB."""
    api_key_secret: str = ""
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
        return max(getattr(model.config, "nnodes", 1) for model in self.models)

    @property
    def gpus(self) -> int:
        """Of the machine that serves."""
        return sum(model.config.gpus_asked for model in self.models)

    @property
    def ranks(self) -> int:
        """Processes that hold models, on the machine that serves."""
        return sum(ranks_of(model.config) for model in self.models)

    @property
    def cpus(self) -> int:
        """One for the server; for each rank one, or its threads where the CPUs compute."""
        return self.options.cpus or 1 + sum(
            ranks_of(m.config) * (m.config.num_threads or (1 if m.config.gpus_asked else 2))
            for m in self.models
        )

    @property
    def memory_gib(self) -> int:
        """1 GiB for the server, 2 for each rank, the weights and a quarter, and /dev/shm."""
        weights = 1.25 * sum(self.weights.values()) / GIB
        return self.options.memory or 1 + 2 * self.ranks + math.ceil(weights) + self.shm_gib

    @property
    def shm_gib(self) -> int:
        """Shared memory, which the ranks of a model on one machine talk through: 1 GiB each."""
        return max(1, sum(n for m in self.models if (n := ranks_of(m.config)) > 1))

    @cached_property
    def weights(self) -> Mapping[str, int]:
        """Model to the bytes of its weights."""
        return {
            m.config.name: sum(f.stat().st_size for f in m.config.model_path.rglob("*.safetensors"))
            for m in self.models
        }

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
        """The image to run. Raises: ConfigError if nobody says."""
        if image := self.options.image or self.options.bento:
            return image
        raise ConfigError("--image is needed: which image to run")

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
        if not self.gpus:  # A container sees all cores of the machine, and would use them.
            threads = max(1, (self.cpus - 1) // self.ranks)
            found.setdefault(f"{PREFIX}NUM_THREADS", str(threads))
        return dict(sorted(found.items()))


def ranks_of(config: BaseRunnerConfig) -> int:
    """Processes that hold the model on one machine, those of a deployment of MII's own too."""
    if isinstance(config, MIIConfig) and config.mii.mode == "persistent":
        here = config.mii.host is None
        return 1 + config.tensor_parallel * config.mii.replica_num * here
    return config.local_world_size


def make_plan(options: Options, settings: Settings) -> Plan:
    """The plan for the bento's models, else those of the settings.

    Raises: ConfigError, one sentence for the operator.
    """
    if settings.api_key is not None:
        raise ConfigError(
            f"{PREFIX}API_KEY is never written down: unset it, and say with --api-key-secret where "
            "the deployment finds the key"
        )
    if options.max_replicas < options.replicas:
        raise ConfigError("--max-replicas must not be below --replicas")
    chosen = _in_bento(options.bento) if options.bento else _in_settings(settings)
    if not chosen:
        raise ConfigError(
            "no model is chosen: name a bento that has one (--bento), or a model with --text-model "
            "or --image-model"
        )
    models = tuple(Chosen(f, c, _config(c, f, options, settings)) for f, c in chosen.items())
    return Plan(options, settings, models)


def _in_settings(settings: Settings) -> dict[str, str]:
    chosen = {"text_model": settings.text_model, "image_model": settings.image_model}
    return {field: choice for field, choice in chosen.items() if choice}


def _in_bento(tag: str) -> dict[str, str]:
    """The models recorded in a bento. Raises: ConfigError."""
    try:
        info = bentoml.bentos.get(tag).info
    except (BentoMLException, ValueError):
        stored = ", ".join(sorted(str(b.tag) for b in bentoml.bentos.list())) or "none"
        raise ConfigError(f"{tag} is not a bento of the store; bentos there: {stored}") from None
    frozen = {model.tag.name: str(model.tag) for model in info.all_models}
    chosen = {}
    for field in ("text_model", "image_model"):
        if built := str(info.args.get(field, "")):
            if is_folder(built) or (name := built.partition(":")[0]) not in frozen:
                raise ConfigError(f"{tag} was built with the folder {built}, which is not in it")
            chosen[field] = frozen[name]
    return chosen


def _config(choice: str, field: str, options: Options, settings: Settings) -> BaseRunnerConfig:
    """How the model will be run. Raises: ConfigError."""
    settable = OVERRIDES if field == "text_model" else IMAGE_OVERRIDES
    try:
        return model_config(choice, settings, settable)
    except ConfigError as error:
        # Where the machines of a model meet is decided here, unless it is already.
        meeting = {"rdzv_endpoint": rendezvous(options.name)}
        if settings.rdzv_endpoint is None and field == "text_model":
            try:
                return model_config(choice, settings.model_copy(update=meeting), settable)
            except ConfigError:
                raise error from None
        raise


def rendezvous(name: str) -> str:
    """`host:port` of node 0, as the other machines' pods know it."""
    return f"{name}-0.{name}-nodes:{RENDEZVOUS_PORT}"


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
