"""Run-time choices, read once from `TRIPTYCH_*` environment variables.

`python -m settings` prints the table that the README shows.
"""

from __future__ import annotations

import os
from difflib import get_close_matches
from functools import lru_cache
from typing import Annotated

from pydantic import AfterValidator, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from runners.config.model import Engine, describe_fields, explain
from runners.contracts.errors import ConfigError

PREFIX = "TRIPTYCH_"
TIMER_SLACK_S = 30.0


def _bare(key: SecretStr) -> SecretStr:
    """A key without the line end of the file it came from."""
    bare = key.get_secret_value().strip()
    if not bare:
        raise ValueError("is blank; unset it to serve without a key")
    return SecretStr(bare)


class Settings(BaseSettings):
    """What to serve and within which limits."""

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
    """Over how many ranks the model is split; overrides the model's own."""
    nnodes: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Over how many machines its ranks are spread; overrides the model's own."""
    node_rank: Annotated[int, Field(ge=0)] | None = None
    """Which of them this is; 0 serves, the others run `python -m cli.join`."""
    rdzv_endpoint: str | None = None
    """`host:port` of machine 0 where they meet; overrides the model's own."""
    max_queue: Annotated[int, Field(ge=1, le=1_000_000)] = 256
    """Sequences in the house at once, running and waiting; one more gets 429 with Retry-After."""
    max_image_queue: Annotated[int, Field(ge=1, le=1_000_000)] = 64
    """Pictures in the house at once, being painted and waiting; one more gets 429."""
    max_batch_size: Annotated[int, Field(ge=1, le=4096)] | None = None
    """Sequences generated together in one step; overrides the model's own."""
    max_kv_tokens: Annotated[int, Field(ge=32)] | None = None
    """KV cache bound in tokens over all sequences. Default: from the free memory."""
    max_body_bytes: Annotated[int, Field(ge=1024)] = 4 * 1024 * 1024
    """Largest request body in bytes; a larger one gets 413."""
    request_timeout: Annotated[float, Field(gt=0, le=86_400)] = 600.0
    """Seconds a request may take in all, queue included, before it is aborted with 504."""
    task_timeout: Annotated[float, Field(gt=0, le=604_800)] = 3600.0
    """Seconds a submitted task (`/generate_image_task/submit`) may take in all."""
    start_timeout: Annotated[float, Field(gt=0, le=86_400)] | None = None
    """Seconds a model may take from start to ready; overrides the model's own."""
    cpu_kernels: bool | None = None
    """Whether float32 models on a CPU run on Triptych's own kernels; overrides the model's own."""
    num_threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """CPU threads per rank. Default: the machine's cores divided by the ranks."""
    api_key: Annotated[SecretStr, AfterValidator(_bare)] | None = None
    """When set, every route but the health probes asks for `Authorization: Bearer <key>`."""
    port: Annotated[int, Field(ge=1, le=65_535, validation_alias="PORT")] = 3000
    """HTTP port (the variable is `PORT`, without prefix)."""

    @property
    def timer(self) -> float:
        """Seconds of BentoML's timer, which knows the time to first byte only: later than ours."""
        return self.request_timeout + TIMER_SLACK_S

    @model_validator(mode="before")
    @classmethod
    def _empty_is_unset(cls, values: dict[str, object]) -> dict[str, object]:
        # But for the key: a secret that failed to arrive must not open the server to everyone.
        return {name: v for name, v in values.items() if v != "" or name == "api_key"}


@lru_cache(maxsize=1)
def get_settings() -> Settings:
    """The settings of this process. Raises: ConfigError with one sentence for a wrong value."""
    try:
        return Settings()
    except ValidationError as error:
        raise ConfigError(explain(error, name=variable)) from None


def unknown_variables() -> str | None:
    """A warning that names the `TRIPTYCH_*` variables which mean nothing; None if all do."""
    meant = {field.upper(): variable(field) for field in Settings.model_fields}
    given = {name for name in map(str.upper, os.environ) if name.startswith(PREFIX)}
    told = []
    for name in sorted(given - set(meant.values())):
        close = get_close_matches(name.removeprefix(PREFIX), meant, n=1)
        told.append(f"{name} (meant {meant[close[0]]}?)" if close else name)
    return f"ignored, for there is no such variable: {', '.join(told)}" if told else None


def describe_settings() -> str:
    """A Markdown table of all variables, from the types."""
    return describe_fields(Settings, name=variable)


def variable(field: str) -> str:
    """The environment variable that sets a field."""
    name = field.upper()
    return name if name == "PORT" else PREFIX + name


if __name__ == "__main__":
    print(describe_settings())
