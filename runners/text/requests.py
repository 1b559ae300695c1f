"""Checks of requests that Triptych's scheduler and MII's deployment have in common."""

from __future__ import annotations

from runners.contracts.errors import ContextLengthExceeded, InvalidRequest
from runners.contracts.text import SamplingParams

DEFAULT_NEW_TOKENS = 256


def check_logit_bias(params: SamplingParams, vocab_size: int) -> None:
    """Raises: InvalidRequest for the bias of a token outside the vocabulary."""
    for token in params.logit_bias or ():
        if not 0 <= token < vocab_size:
            raise InvalidRequest(
                f"token id {token} is outside the vocabulary (0 to {vocab_size - 1})",
                field="logit_bias",
            )


def token_limit(
    params: SamplingParams,
    prompt_tokens: int,
    *,
    max_model_len: int,
    min_new_tokens: int,
    max_prompt_tokens: int | None = None,
    default_new_tokens: int | None = None,
) -> int:
    """The maximum number of tokens that a request generates.

    `max_model_len` bounds prompt plus output, `max_prompt_tokens` the prompt; `min_new_tokens` is
    that of the request or the default; `default_new_tokens` applies to a request without a limit.
    Raises: ContextLengthExceeded, InvalidRequest.
    """
    max_prompt = min(max_prompt_tokens or max_model_len, max_model_len - 1)
    if prompt_tokens > max_prompt:
        raise ContextLengthExceeded(
            f"has {prompt_tokens} tokens; at most {max_prompt} are allowed", field="prompt"
        )
    room = max_model_len - prompt_tokens
    limit = params.max_new_tokens
    if limit is None:
        otherwise = room if params.fill_context else DEFAULT_NEW_TOKENS
        default = params.default_new_tokens or default_new_tokens or otherwise
        limit = min(room, max(default, min_new_tokens))
    if limit > room:
        raise ContextLengthExceeded(
            f"is {limit}, but at most {room} tokens fit: the prompt has {prompt_tokens} tokens and "
            f"the model's context {max_model_len}",
            field="max_new_tokens",
        )
    if min_new_tokens > limit:
        raise InvalidRequest(
            f"is {min_new_tokens}, more than the {limit} tokens that may be generated",
            field="min_new_tokens",
        )
    return limit
