"""Run-time settings, read once from `TRIPTYCH_*` environment variables.

`python -m settings` prints the table in the documentation.
"""

from __future__ import annotations

import os
from difflib import get_close_matches
from functools import lru_cache
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from runners.config.base import Engine
from runners.config.describe import describe_fields
from runners.contracts.errors import ConfigError
from runners.contracts.validation import problems_of

PREFIX = "TRIPTYCH_"
BENTOML_SLACK_S = 30.0


def _stripped(key: SecretStr) -> SecretStr:
    """A key without the line end of its file."""
    text = key.get_secret_value().strip()
    if not text:
        raise ValueError("is blank; unset it to serve without a key")
    return SecretStr(text)


def _upper_case(value: object) -> object:
    return value.upper() if isinstance(value, str) else value


def _split(value: object) -> object:
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


Aliases = Annotated[
    tuple[Annotated[str, Field(min_length=1, max_length=256)], ...],
    NoDecode,
    BeforeValidator(_split),
]


class Settings(BaseSettings):
    """The models to serve, how they are run, and the limits of requests."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, use_attribute_docstrings=True, extra="ignore"
    )

    text_model: str = ""
    """Text model to serve: a BentoML store tag (`name` or `name:version`) or a folder. Empty: none.
    In a built bento, the model chosen at build time."""
    image_model: str = ""
    """Image model to serve: a store tag or a folder. Empty: none."""
    text_engine: Engine | None = None
    """Overrides the engine that the text model's `setup_config.json` names."""
    image_engine: Engine | None = None
    """Overrides the engine that the image model's `setup_config.json` names."""
    tensor_parallel: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Number of ranks the model is split over; overrides the model's own."""
    nnodes: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Number of machines the ranks are spread over; overrides the model's own."""
    node_rank: Annotated[int, Field(ge=0)] | None = None
    """The index of this machine; 0 serves, the others run `python -m cli.join`."""
    rdzv_endpoint: str | None = None
    """`host:port` of machine 0 where the machines meet; overrides the model's own."""
    model_aliases: Aliases = ()
    """Further names by which clients may call the text model, separated by commas. They may be
    patterns, such as `gpt-*`."""
    max_queue: Annotated[int, Field(ge=1, le=1_000_000)] = 256
    """Maximum admitted sequences (running + queued); further requests get 429 with Retry-After."""
    max_image_queue: Annotated[int, Field(ge=1, le=1_000_000)] = 64
    """Maximum admitted images (running + queued); further requests get 429 with Retry-After."""
    max_batch_size: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Maximum sequences in one step; overrides the model's own."""
    max_kv_tokens: Annotated[int, Field(ge=32)] | None = None
    """Size of the KV cache in tokens; overrides the model's own. Default: from the free memory."""
    max_body_bytes: Annotated[int, Field(ge=1024)] = 4 * 1024 * 1024
    """Maximum request body in bytes; a larger one gets 413."""
    max_logprobs: Annotated[int, Field(ge=1, le=100_000_000)] = 1_000_000
    """Maximum log-probabilities that a request may ask for: its sequences, times the tokens of
    each, times one more than the alternatives; more are 400. Each takes about 100 bytes."""
    request_timeout: Annotated[float, Field(gt=0, le=86_400)] = 600.0
    """Seconds a request may take in total, queue included, before it is aborted with 504."""
    task_timeout: Annotated[float, Field(gt=0, le=604_800)] = 3600.0
    """Seconds a submitted job (`/generate_image_task/submit`) may take in total."""
    max_result_bytes: Annotated[int, Field(ge=1)] = 256 * 1024 * 1024
    """Maximum bytes of the results of jobs, which are kept on disk for 24 hours; beyond it those
    of the oldest jobs are deleted, and the last one is kept."""
    start_timeout: Annotated[float, Field(gt=0, le=86_400)] | None = None
    """Seconds a model may take from start to ready; overrides the model's own."""
    cpu_kernels: bool | None = None
    """Whether text models on a CPU run on Triptych's own kernels; overrides the model's own."""
    num_threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """CPU threads per rank. Default: the machine's cores divided by the ranks."""
    api_key: Annotated[SecretStr, AfterValidator(_stripped)] | None = None
    """If set, every route except the health probes requires `Authorization: Bearer <key>`
    or `x-api-key: <key>`."""
    port: Annotated[int, Field(ge=1, le=65_535, validation_alias="PORT")] = 3000
    """HTTP port (the variable is `PORT`, without prefix)."""
    log_level: Annotated[
        Literal["DEBUG", "INFO", "WARNING", "ERROR"], BeforeValidator(_upper_case)
    ] = "INFO"
    """Level of Triptych's log lines, in the HTTP worker and in the ranks."""
    log_format: Literal["text", "json"] = "text"
    """Format of these lines: text, or one JSON object per line."""

    @property
    def timer(self) -> float:
        """Seconds of BentoML's timer for the first byte of a response: later than our deadline."""
        return self.request_timeout + BENTOML_SLACK_S

    @model_validator(mode="before")
    @classmethod
    def _empty_is_unset(cls, values: dict[str, object]) -> dict[str, object]:
        # Except for the key: a secret that is empty by mistake must not open the server to all.
        return {name: v for name, v in values.items() if v != "" or name == "api_key"}


@lru_cache(maxsize=1)
def get_settings() -> Settings:
    """The settings of this process. Raises: ConfigError with one sentence for a wrong value."""
    try:
        return Settings()
    except ValidationError as error:
        problems = [f"{variable(p.field)}: {p.requirement}" for p in problems_of(error)]
        raise ConfigError("; ".join(problems)) from None


def unknown_variables() -> str | None:
    """A warning that names unknown `TRIPTYCH_*` variables; None if there are none."""
    known = {field.upper(): variable(field) for field in Settings.model_fields}
    variables = {name for name in map(str.upper, os.environ) if name.startswith(PREFIX)}
    unknown = []
    for name in sorted(variables - set(known.values())):
        close = get_close_matches(name.removeprefix(PREFIX), known, n=1)
        unknown.append(f"{name} (did you mean {known[close[0]]}?)" if close else name)
    return f"unknown variables are ignored: {', '.join(unknown)}" if unknown else None


def describe_settings() -> str:
    """A Markdown table of all variables, from the types."""
    return describe_fields(Settings, name=variable)


def variable(field: str) -> str:
    """The environment variable that sets a field."""
    name = field.upper()
    return name if name == "PORT" else PREFIX + name


if __name__ == "__main__":
    print(describe_settings())
