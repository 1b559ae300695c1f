"""Mode `persistent`: a deployment of MII, started or found, and asked through gRPC.

MII takes text and a handful of parameters. What it can not be asked (seeds aside, which ours takes)
is refused with a sentence, never dropped.
"""

from __future__ import annotations

import asyncio
import subprocess
import threading
import time
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import msgspec
from safetensors import safe_open
from transformers import AutoConfig, GenerationConfig
from typing_extensions import override

from runners.config.model import MIITextConfig
from runners.contracts.errors import (
    ConfigError,
    EngineFailure,
    InvalidRequest,
    RunnerUnavailable,
)
from runners.contracts.runner import RunnerState
from runners.contracts.text import GenerationRequest, ModelInfo, TextDelta
from runners.engines.mii.defaults import mii_defaults
from runners.engines.mii.deployment.client import Deployment
from runners.engines.mii.deployment.places import deployment_folder, free_port, listens
from runners.engines.mii.deployment.plan import DeploymentPlan, fingerprint, plan_replicas
from runners.engines.mii.deployment.proto import tokens_of
from runners.engines.mii.deployment.starting import (
    LEAVING_S,
    found,
    runs_already,
    start,
    wait_until_serving,
)
from runners.engines.mii.fastgen import model_values
from runners.hf.models import (
    SamplingDefaults,
    context_length,
    load_tokenizer,
    loading,
    stored_dtype,
)
from runners.protocol.messages import (
    Abort,
    Accepted,
    Detokenize,
    Events,
    HostMessage,
    Submit,
    Tokenize,
    request_failed,
)
from runners.rank.program import Occupancy, RankContext, RankProgram
from runners.text.requests import answer_call, token_limit
from runners.text.tokenization import PromptTokenizer

WATCH_S = 0.25
CONNECT_S = 30.0
LOST_S = 2.0
"""How long a deployment, or all of its replicas, may be out of reach."""
SETTINGS = ("dtype", "cpu_kernels", "weight_quantization", "prefix_caching", "num_threads")
FINISHED = {"stop": "stop", "length": "length"}
REFUSED = ("repetition_penalty", "presence_penalty", "frequency_penalty", "logprobs")
NEUTRAL = (None, 0.0, 1.0)


def load_persistent(context: RankContext, config: MIITextConfig) -> PersistentProgram:
    """Start or find the deployment, wait until it serves. Raises: ConfigError."""
    with loading(config.name):
        own = AutoConfig.from_pretrained(config.model_path, trust_remote_code=False)
    file = config.model_path / "generation_config.json"
    generation = GenerationConfig.from_pretrained(config.model_path) if file.is_file() else None
    keeper, replicas = None, list[int]()
    if config.mii.host is not None:
        host, port = config.mii.host, config.mii.port_number or 0
        context.progress(RunnerState.LOADING, f"waiting for the deployment at {host}:{port}")
        while not listens(port, host):
            time.sleep(WATCH_S)
    else:
        host, (plan, keeper) = "127.0.0.1", _start(context, config)
        port, replicas = plan.port, [replica.port for replica in plan.replicas]
    defaults = mii_defaults(config.mii.generate, generation)
    stored = stored_dtype(own, config.model_path)
    info = ModelInfo(
        architecture=(own.architectures or [own.model_type])[0],
        engine=config.engine,
        parameters=_parameters(config.model_path),
        dtype=str(stored or "unknown").removeprefix("torch."),
        devices=[f"{host}:{port}"],
        max_context=min(context_length(own), config.mii.max_total_tokens),
        vocab_size=own.get_text_config().vocab_size,
        max_kv_tokens=config.max_kv_tokens or context_length(own),
        has_chat_template=False,
        default_temperature=defaults.temperature,
    )
    return PersistentProgram(
        context,
        config,
        info,
        defaults=defaults,
        address=(host, port),
        keeper=keeper,
        replicas=replicas,
    )


def _start(
    context: RankContext, config: MIITextConfig
) -> tuple[DeploymentPlan, subprocess.Popen[bytes] | None]:
    """The deployment that serves, and what keeps it if it goes with us. Raises: ConfigError."""
    name = config.mii.deployment_name or f"{config.name}-mii-deployment"
    folder = deployment_folder(name)
    plan, keep_alive = plan_of(config, name, context.num_threads), config.mii.keep_alive
    gone_by = time.monotonic() + LEAVING_S
    context.progress(RunnerState.LOADING, f"starting deployment {name}")
    while (keeper := start(plan, folder, outlives=keep_alive)) is None:
        running = found(folder) if keep_alive else None
        if running is not None:
            _refuse_another(running, plan, config)
            if all(map(listens, running.doors)):
                return running, None
            context.progress(RunnerState.LOADING, f"waiting for deployment {name}")
        elif time.monotonic() > gone_by:
            raise runs_already(name, folder)
        time.sleep(WATCH_S)
    if keep_alive:
        keeper.wait()  # it has left a process of its own
    wait_until_serving(plan, folder)
    return plan, None if keep_alive else keeper


def _refuse_another(running: DeploymentPlan, plan: DeploymentPlan, config: MIITextConfig) -> None:
    """Raises: ConfigError if what runs is not what a config describes."""
    other = running.differs(plan)
    for field in ("port_number", "restful_api_port"):
        asked = getattr(config.mii, field)
        if asked is not None and asked not in (running.port, running.rest_port):
            other.append(field)
    if other:
        raise ConfigError(
            f"deployment {plan.name} runs with another {', '.join(other)}: terminate it, or give "
            "this one another mii.deployment_name"
        )


def plan_of(config: MIITextConfig, name: str, threads: int) -> DeploymentPlan:
    """The deployment that a config describes, with ports found free where it says none."""
    section, ranks = config.mii, config.tensor_parallel
    replicas = plan_replicas(
        [replica.model_dump() for replica in section.replica_configs],
        section.device_map,
        replicas=section.replica_num,
        ranks=ranks,
        torch_dist_port=section.torch_dist_port,
        zmq_port=section.zmq_port_number,
    )
    each = max(1, threads // (section.replica_num * ranks))
    rest_port = section.restful_api_port or free_port() if section.enable_restful_api else None
    return DeploymentPlan(
        name=name,
        port=section.port_number or free_port(),
        model_config=model_values(config),
        replicas=replicas,
        settings={k: getattr(config, k) for k in SETTINGS} | {"num_threads": each},
        rest_host=section.restful_api_host,
        rest_port=rest_port,
        rest_limit=section.restful_processes,
        weights=fingerprint(config.model_path),
    )


class PersistentProgram(RankProgram):
    """Passes requests on to the deployment, and watches it."""

    def __init__(
        self,
        context: RankContext,
        config: MIITextConfig,
        info: ModelInfo,
        *,
        defaults: SamplingDefaults,
        address: tuple[str, int],
        keeper: subprocess.Popen[bytes] | None,
        replicas: Sequence[int],
    ) -> None:
        tokenizer = load_tokenizer(config.model_path)
        has_chat_template = bool(tokenizer.chat_template)
        self._info = msgspec.structs.replace(info, has_chat_template=has_chat_template)
        self._config = config
        self._defaults = defaults
        self._emit = context.emit
        self._keeper = keeper
        self._replicas = replicas
        self._down = 0
        self._tokenizer = PromptTokenizer(tokenizer, info.vocab_size)
        self._loop = asyncio.new_event_loop()
        self._running: dict[str, Future[None]] = {}
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._deployment = asyncio.run_coroutine_threadsafe(
            _connected(*address), self._loop
        ).result()
        self._lost = self._spawn(self._deployment.lost(LOST_S))

    @property
    @override
    def info(self) -> ModelInfo:
        return self._info

    @override
    def receive(self, message: HostMessage) -> None:
        match message:
            case Submit(GenerationRequest() as request):
                work = self._spawn(self._generate(request))
                self._running[request.request_id] = work
                work.add_done_callback(lambda _: self._running.pop(request.request_id, None))
            case Abort(request_id):
                if (task := self._running.pop(request_id, None)) is not None:
                    task.cancel()
            case Tokenize() | Detokenize():
                self._spawn(self._answer(message))
            case _:
                raise ValueError(f"unexpected {type(message).__name__}")

    @override
    def step(self) -> None:
        """Wait a moment. Ends this rank if the deployment is gone, so that both are restarted, or
        if none of its replicas is up: the rank is ready again once one is."""
        time.sleep(WATCH_S)
        if self._keeper is not None and self._keeper.poll() is not None:
            raise RuntimeError("the deployment ended")
        if self._lost.done():
            raise RuntimeError("the deployment cannot be reached")
        up = not self._replicas or any(map(listens, self._replicas))
        self._down = 0 if up else self._down + 1
        if self._down * WATCH_S > LOST_S:
            raise RuntimeError("no replica of the deployment is up")

    @override
    def occupancy(self) -> Occupancy:
        # MII does not report its KV.
        return Occupancy(running=len(self._running))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> Future[None]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _generate(self, request: GenerationRequest) -> None:
        call = None
        try:
            ids, text = await asyncio.to_thread(self._prompt, request)
            kwargs = self._kwargs(request, len(ids))
            self._emit(Accepted(request.request_id, len(ids)))
            call = self._deployment.stream(text, **kwargs)
            async for reply in call:
                self._emit(Events([self._delta(request.request_id, reply.response[0])]))
        except asyncio.CancelledError:
            raise
        except grpc.aio.AioRpcError as error:
            self._emit(request_failed(request.request_id, _error(error)))
        except Exception as error:  # one request's trouble must not end the rank
            self._emit(request_failed(request.request_id, error))
        finally:
            if call is not None:
                call.cancel()

    def _delta(self, request_id: str, reply: Any) -> TextDelta:
        tokens = tokens_of(reply)
        if tokens is None:  # stock MII does not say
            tokens = self._tokenizer.encode(reply.response, add_special_tokens=False)
        reason: Any = FINISHED.get(reply.finish_reason)
        return TextDelta(
            request_id=request_id, text=reply.response, token_ids=tokens, finish_reason=reason
        )

    def _prompt(self, request: GenerationRequest) -> tuple[list[int], str]:
        """A prompt's tokens, and the text from which MII makes the same. Raises: InvalidRequest."""
        tokenizer = self._tokenizer
        ids = tokenizer.ensure_not_empty(
            tokenizer.encode(request.prompt, max_tokens=self.info.max_model_len)
        )
        if isinstance(request.prompt, str) and request.prompt:
            return ids, request.prompt
        text = tokenizer.decode(ids, skip_special_tokens=False)
        bos = tokenizer.tokenizer.bos_token or ""
        for candidate in (text, text.removeprefix(bos)):
            if tokenizer.encode(candidate) == ids:
                return ids, candidate
        raise InvalidRequest(
            "these token ids are not those of their text, and MII's deployments take text only: "
            "use mii.mode pipeline",
            field="prompt",
        )

    def _kwargs(self, request: GenerationRequest, prompt_tokens: int) -> dict[str, Any]:
        """`GenerateParamsConfig`'s values. Raises: InvalidRequest, ContextLengthExceeded."""
        params, defaults = request.sampling, self._defaults
        for name in REFUSED:
            value = getattr(params, name)
            if value not in NEUTRAL or (name == "logprobs" and value is not None):
                raise InvalidRequest(
                    "is not available from a persistent MII deployment", field=name
                )
        min_new_tokens = int(_or(params.min_new_tokens, defaults.min_new_tokens))
        max_new_tokens = token_limit(
            params,
            prompt_tokens,
            max_model_len=self.info.max_model_len,
            min_new_tokens=min_new_tokens,
            default_new_tokens=self._config.max_new_tokens,
        )
        temperature = _or(params.temperature, _or(defaults.temperature, 0.0))
        ignore_eos = defaults.ignore_eos if params.ignore_eos is None else params.ignore_eos
        kwargs: dict[str, Any] = {
            "max_length": prompt_tokens + max_new_tokens,
            "max_new_tokens": max_new_tokens,
            "min_new_tokens": min_new_tokens,
            "ignore_eos": ignore_eos,
            "do_sample": temperature >= 1e-5,
        }
        if temperature >= 1e-5:
            kwargs |= {
                "temperature": float(temperature),
                "top_p": max(float(_or(params.top_p, defaults.top_p)), 1e-6),
                "top_k": int(_or(params.top_k, defaults.top_k)) or None,
                "seed": None if params.seed is None else _signed(params.seed),
            }
        stop = defaults.stop if params.stop is None else params.stop
        if stop:
            kwargs["stop"] = list(stop)
        return kwargs

    async def _answer(self, call: Tokenize | Detokenize) -> None:
        self._emit(await asyncio.to_thread(answer_call, self._tokenizer, call))


async def _connected(host: str, port: int) -> Deployment:
    """A deployment of the loop that runs this, to which gRPC ties it. Raises: ConfigError."""
    deployment = Deployment(host, port)
    try:
        async with asyncio.timeout(CONNECT_S):
            await deployment.connect()
    except TimeoutError:
        raise ConfigError(f"what listens at {host}:{port} is no deployment of MII") from None
    return deployment


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _signed(seed: int) -> int:
    """Into the 64 bits of MII's wire."""
    return (seed + 2**63) % 2**64 - 2**63


def _error(error: grpc.aio.AioRpcError) -> Exception:
    detail = str(error.details())
    if error.code() == grpc.StatusCode.INVALID_ARGUMENT:
        return InvalidRequest(f"MII refuses this request: {detail}")
    if error.code() == grpc.StatusCode.UNAVAILABLE:
        return RunnerUnavailable(f"the MII deployment: {detail}")
    return EngineFailure(f"the MII deployment failed on this request: {detail}")


def _parameters(folder: Path) -> int:
    """How many numbers the weights are, from their files' headers."""
    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - a safetensors file, not a dict
                count = 1
                for size in tensors.get_slice(name).get_shape():
                    count *= size
                total += count
    return total
