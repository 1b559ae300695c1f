"""Mode `persistent`: a deployment of MII, started or found, and asked through gRPC.

MII takes text and a handful of parameters. What it can not be asked (seeds aside, which ours takes)
is refused with a sentence, never dropped.
"""

from __future__ import annotations

import asyncio
import subprocess
import threading
import time
from collections.abc import Coroutine
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from safetensors import safe_open
from transformers import AutoConfig, GenerationConfig

from runners.config import MIIConfig
from runners.contracts import GenerationRequest, ModelInfo, RunnerState, TextDelta
from runners.errors import (
    ConfigError,
    ContextLengthExceeded,
    EngineFailure,
    InvalidRequest,
    RunnerUnavailable,
)
from runners.mii_deployment.client import Deployment
from runners.mii_deployment.places import free_port, listens, private_cache
from runners.mii_deployment.plan import PLAN, DeploymentPlan, plan_replicas
from runners.mii_deployment.proto import tokens_of
from runners.mii_deployment.starting import running, start, why_ended
from runners.mii_fastgen import model_values
from runners.ragged.loading import (
    context_length,
    load_tokenizer,
    loading_of,
    sampling_defaults,
    stored_dtype,
)
from runners.ragged.program import DEFAULT_NEW_TOKENS, failure
from runners.ragged.sampling import SamplingDefaults
from runners.ragged.tokenization import PromptTokenizer
from runners.ranks.messages import (
    Abort,
    Accepted,
    CallFailed,
    Deltas,
    Detokenize,
    HostMessage,
    Submit,
    Text,
    Tokenize,
    Tokens,
)
from runners.ranks.worker import Occupancy, RankContext

WATCH_S = 0.25
LEAVING_S = 5.0
"""How long the deployment of a rank that was lost may take to follow it."""
SETTINGS = ("dtype", "cpu_kernels", "weight_quantization", "prefix_caching", "num_threads")
FINISHED = {"stop": "stop", "length": "length"}
REFUSED = ("repetition_penalty", "presence_penalty", "frequency_penalty", "logprobs")
NEUTRAL = (None, 0.0, 1.0)


def load_persistent(context: RankContext, config: MIIConfig) -> PersistentProgram:
    """Start or find the deployment, wait until it serves. Raises: ConfigError."""
    with loading_of(config.name):
        own = AutoConfig.from_pretrained(config.model_path, trust_remote_code=False)
    file = config.model_path / "generation_config.json"
    generation = GenerationConfig.from_pretrained(config.model_path) if file.is_file() else None
    keeper = None
    if config.mii.host is not None:
        host, port = config.mii.host, config.mii.port_number or 0
        context.progress(RunnerState.LOADING, f"waiting for the deployment at {host}:{port}")
        while not listens(port, host):
            time.sleep(WATCH_S)
    else:
        host, (port, keeper) = "127.0.0.1", _start(context, config)
    defaults = sampling_defaults(generation)
    stored = stored_dtype(own, config.model_path)
    info = ModelInfo(
        architecture=(own.architectures or [own.model_type])[0],
        engine=config.engine,
        parameters=_parameters(config.model_path),
        dtype=str(stored or "unknown").removeprefix("torch."),
        devices=[f"{host}:{port}"],
        max_context=min(context_length(own), config.mii.longest),
        vocab_size=own.get_text_config().vocab_size,
        max_kv_tokens=config.max_kv_tokens or context_length(own),
        has_chat_template=False,
        default_temperature=defaults.temperature or None,
    )
    return PersistentProgram(
        context, config, info, defaults=defaults, address=(host, port), keeper=keeper
    )


def _start(context: RankContext, config: MIIConfig) -> tuple[int, subprocess.Popen[bytes] | None]:
    """The port of our deployment, and what keeps it if it goes with us."""
    name = config.mii.deployment_name or f"{config.name}-mii-deployment"
    folder = private_cache() / name
    gone_by = time.monotonic() + LEAVING_S
    while (found := running(folder)) is not None:
        if config.mii.keep_alive:
            return found.port, None
        if time.monotonic() > gone_by:
            raise ConfigError(
                f"a deployment {name} runs already: give this one another mii.deployment_name, or "
                f"connect to that one with mii.host 127.0.0.1 and mii.port_number {found.port}"
            )
        time.sleep(WATCH_S)
    plan = plan_of(config, name, context.num_threads)
    write_score_file(plan, folder)
    context.progress(RunnerState.LOADING, f"starting deployment {name}")
    keeper = start(plan, folder, outlives=config.mii.keep_alive)
    if config.mii.keep_alive:
        keeper.wait()
    ports = [plan.port, *(replica.port for replica in plan.replicas)]
    while not all(map(listens, ports)):
        if not (folder / PLAN).exists():
            raise ConfigError(why_ended(name, folder))
        time.sleep(WATCH_S)
    return plan.port, None if config.mii.keep_alive else keeper


def plan_of(config: MIIConfig, name: str, threads: int) -> DeploymentPlan:
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
    )


def write_score_file(plan: DeploymentPlan, folder: Path) -> None:
    """What stock `mii.client(name)` finds a deployment by: a module with MIIConfig's values."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    values = {
        "deployment_name": plan.name,
        "deployment_type": "local",
        "model_conf": plan.model_config,
        "port_number": plan.port,
        "enable_restful_api": plan.rest_port is not None,
        "restful_api_host": plan.rest_host,
        "restful_api_port": plan.rest_port or 51080,
    }
    (folder / "score.py").write_text(f"mii_config = {values!r}\n", encoding="utf-8")


class PersistentProgram:
    """See `ranks.worker.RankProgram`: passes requests on, and watches the deployment."""

    def __init__(
        self,
        context: RankContext,
        config: MIIConfig,
        info: ModelInfo,
        *,
        defaults: SamplingDefaults,
        address: tuple[str, int],
        keeper: subprocess.Popen[bytes] | None,
    ) -> None:
        tokenizer = load_tokenizer(config.model_path)
        self.info = replace(info, has_chat_template=bool(tokenizer.chat_template))
        self._config = config
        self._defaults = defaults
        self._emit = context.emit
        self._address = address
        self._keeper = keeper
        self._tokenizer = PromptTokenizer(tokenizer, info.vocab_size)
        self._loop = asyncio.new_event_loop()
        self._running: dict[str, Future[None]] = {}
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._deployment = asyncio.run_coroutine_threadsafe(
            _connected(*address), self._loop
        ).result()

    def receive(self, message: HostMessage) -> None:
        """Take a message of the host; called by the reader thread."""
        match message:
            case Submit(request):
                self._running[request.request_id] = self._spawn(self._generate(request))
            case Abort(request_id):
                if (task := self._running.pop(request_id, None)) is not None:
                    task.cancel()
            case Tokenize() | Detokenize():
                self._spawn(asyncio.to_thread(self._answer, message))
            case _:
                raise ValueError(f"unexpected {type(message).__name__}")

    def step(self) -> None:
        """Wait a moment; end this rank if the deployment is gone, so that both come back."""
        time.sleep(WATCH_S)
        if self._keeper is not None and self._keeper.poll() is not None:
            raise RuntimeError("the deployment ended")
        host, port = self._address
        if self._keeper is None and not listens(port, host):
            raise RuntimeError("the deployment can not be reached")

    def occupancy(self) -> Occupancy:
        """What MII is asked at the moment; how full its KV is, it does not say."""
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
                self._emit(Deltas([self._delta(request.request_id, reply.response[0])]))
        except asyncio.CancelledError:
            raise
        except grpc.aio.AioRpcError as error:
            self._emit(failure(request.request_id, _error(error)))
        except Exception as error:  # one request's trouble must not end the rank
            self._emit(failure(request.request_id, error))
        finally:
            if call is not None:
                call.cancel()
            self._running.pop(request.request_id, None)

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
        ids = tokenizer.begin(tokenizer.encode(request.prompt, max_tokens=self.info.max_model_len))
        if isinstance(request.prompt, str) and request.prompt:
            return ids, request.prompt
        text = tokenizer.decode(ids, skip_special_tokens=False)
        bos = tokenizer.tokenizer.bos_token or ""
        for candidate in (text, text.removeprefix(bos)):
            if tokenizer.encode(candidate) == ids:
                return ids, candidate
        raise InvalidRequest(
            "these token ids are not what their text is tokenised to, and MII's deployments take "
            "text only: use mii.mode pipeline",
            param="prompt",
        )

    def _kwargs(self, request: GenerationRequest, prompt_tokens: int) -> dict[str, Any]:
        """`GenerateParamsConfig`'s values. Raises: InvalidRequest, ContextLengthExceeded."""
        params, defaults = request.sampling, self._defaults
        for name in REFUSED:
            value = getattr(params, name)
            if value not in NEUTRAL or (name == "logprobs" and value is not None):
                raise InvalidRequest(
                    f"{name} is not available from a persistent MII deployment", param=name
                )
        room = self.info.max_model_len - prompt_tokens
        wanted = params.max_new_tokens
        if wanted is None:
            own = params.default_new_tokens or self._config.max_new_tokens
            wanted = min(room, max(own or DEFAULT_NEW_TOKENS, params.min_new_tokens))
        if room < 1 or wanted > room:
            raise ContextLengthExceeded(
                f"the prompt has {prompt_tokens} tokens and max_new_tokens is {wanted}, but the "
                f"model's context holds {self.info.max_model_len}",
                param="max_new_tokens" if room > 0 else "prompt",
            )
        if params.min_new_tokens > wanted:
            raise InvalidRequest(
                f"min_new_tokens ({params.min_new_tokens}) exceeds max_new_tokens ({wanted})",
                param="min_new_tokens",
            )
        temperature = _or(params.temperature, defaults.temperature)
        kwargs: dict[str, Any] = {
            "max_length": prompt_tokens + wanted,
            "max_new_tokens": wanted,
            "min_new_tokens": params.min_new_tokens,
            "ignore_eos": params.ignore_eos,
            "do_sample": temperature >= 1e-5,
        }
        if temperature >= 1e-5:
            kwargs |= {
                "temperature": float(temperature),
                "top_p": max(float(_or(params.top_p, defaults.top_p)), 1e-6),
                "top_k": int(_or(params.top_k, defaults.top_k)) or None,
                "seed": None if params.seed is None else _signed(params.seed),
            }
        if params.stop:
            kwargs["stop"] = list(params.stop)
        return kwargs

    def _answer(self, call: Tokenize | Detokenize) -> None:
        try:
            if isinstance(call, Tokenize):
                ids = self._tokenizer.encode(
                    call.prompt, add_special_tokens=call.add_special_tokens
                )
                self._emit(Tokens(call.call_id, ids))
            else:
                text = self._tokenizer.decode(
                    call.token_ids, skip_special_tokens=call.skip_special_tokens
                )
                self._emit(Text(call.call_id, text))
        except Exception as error:  # as in _generate
            failed = failure("", error)
            self._emit(CallFailed(call.call_id, failed.kind, failed.message, failed.param))


async def _connected(host: str, port: int) -> Deployment:
    """A deployment of the loop that runs this, to which gRPC ties it."""
    deployment = Deployment(host, port)
    await deployment.connect()
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
