"""Mode `persistent`: starts or finds a deployment of MII, to which this rank forwards requests."""

from __future__ import annotations

import subprocess
import time

from transformers import AutoConfig

from runners.config.model import MIITextConfig
from runners.contracts.errors import ConfigError
from runners.contracts.runner import RunnerState
from runners.contracts.text import ModelInfo
from runners.engines.mii.defaults import load_generation_config, mii_defaults
from runners.engines.mii.deployment.plan import (
    ENGINE_FIELDS,
    DeploymentPlan,
    Timeouts,
    plan_deployment,
    weights_digest,
)
from runners.engines.mii.deployment.ports import LOOPBACK, listens
from runners.engines.mii.deployment.registry import (
    SHUTDOWN_S,
    already_running,
    deployment_folder,
    find_plan,
)
from runners.engines.mii.deployment.starting import start, wait_until_serving
from runners.engines.mii.fastgen import model_values
from runners.engines.mii.forwarding import POLL_S, PersistentProgram
from runners.hf.models import (
    context_length,
    load_tokenizer,
    loading,
    stored_dtype,
)
from runners.hf.weights import count_parameters, read_header
from runners.rank.program import RankContext
from runners.text.tokenization import PromptTokenizer


def load_persistent(context: RankContext, config: MIITextConfig) -> PersistentProgram:
    """Start or find the deployment and wait until it serves. Raises: ConfigError."""
    with loading(config.name):
        model_config = AutoConfig.from_pretrained(config.model_path, trust_remote_code=False)
    tokenizer = load_tokenizer(config.model_path)
    supervisor, replicas = None, list[int]()
    if config.mii.host is not None:
        host, port = config.mii.host, config.mii.port_number
        assert port is not None  # noqa: S101 - the config's own check
        context.progress(RunnerState.LOADING, f"waiting for the deployment at {host}:{port}")
        while not listens(port, host):
            time.sleep(POLL_S)
    else:
        host, (plan, supervisor) = LOOPBACK, _start(context, config)
        port, replicas = plan.port, [replica.port for replica in plan.replicas]
    defaults = mii_defaults(config.mii.generate, load_generation_config(config.model_path))
    dtype: str = config.dtype
    if dtype == "auto":
        dtype = str(stored_dtype(model_config, config.model_path) or "unknown")
    info = ModelInfo(
        architecture=(model_config.architectures or [model_config.model_type])[0],
        engine=config.engine,
        parameters=count_parameters(
            read_header(file) for file in config.model_path.glob("*.safetensors")
        ).total(),
        dtype=dtype.removeprefix("torch."),
        devices=[f"{host}:{port}"],
        max_context=min(context_length(model_config), config.mii.max_total_tokens),
        vocab_size=model_config.get_text_config().vocab_size,
        max_kv_tokens=config.max_kv_tokens or context_length(model_config),
        has_chat_template=bool(tokenizer.chat_template),
        default_temperature=defaults.temperature,
    )
    return PersistentProgram(
        context,
        config,
        info,
        PromptTokenizer(tokenizer, info.vocab_size, max_tokens=info.max_model_len),
        defaults=defaults,
        address=(host, port),
        supervisor=supervisor,
        replicas=replicas,
    )


def _start(
    context: RankContext, config: MIITextConfig
) -> tuple[DeploymentPlan, subprocess.Popen[bytes] | None]:
    """Start or find a deployment and wait until it serves.

    Returns its plan, and its supervisor if the deployment ends with this rank. Raises: ConfigError.
    """
    name = config.mii.deployment_name or f"{config.name}-mii-deployment"
    folder = deployment_folder(name)
    plan, detached = plan_for(config, name, context.num_threads), config.mii.keep_alive
    deadline = time.monotonic() + SHUTDOWN_S
    context.progress(RunnerState.LOADING, f"starting deployment {name}")
    while (supervisor := start(plan, folder, detached=detached)) is None:
        running = find_plan(folder) if detached else None
        if running is not None:
            _check_same(running, plan, config)
            if all(map(listens, running.listening_ports)):
                return running, None
            context.progress(RunnerState.LOADING, f"waiting for deployment {name}")
        elif time.monotonic() > deadline:
            raise already_running(name, folder)
        time.sleep(POLL_S)
    if detached:
        supervisor.wait()  # it has forked: this is the parent, which exits at once
    wait_until_serving(plan, folder)
    return plan, None if detached else supervisor


def _check_same(running: DeploymentPlan, plan: DeploymentPlan, config: MIITextConfig) -> None:
    """Raises: ConfigError if the running deployment is not the one that the config describes."""
    fields = running.differences(plan)
    for field in ("port_number", "restful_api_port"):
        port = getattr(config.mii, field)
        if port is not None and port not in (running.port, running.rest_port):
            fields.append(field)
    if fields:
        raise ConfigError(
            f"deployment {plan.name} runs with another {', '.join(fields)}: terminate it, or "
            "choose another mii.deployment_name"
        )


def plan_for(config: MIITextConfig, name: str, num_threads: int) -> DeploymentPlan:
    """The plan of the deployment that a config describes, for `num_threads` CPU threads in all."""
    ranks = config.tensor_parallel
    threads_per_rank = max(1, num_threads // (config.mii.replica_num * ranks))
    settings = {field: getattr(config, field) for field in ENGINE_FIELDS}
    return plan_deployment(
        config.mii,
        config.mii,
        name=name,
        ranks=ranks,
        model_config=model_values(config),
        settings=settings | {"num_threads": threads_per_rank},
        weights=weights_digest(config.model_path),
        timeouts=Timeouts(config.start_timeout, config.heartbeat_timeout, config.step_timeout),
    )
