"""The distribution of the next token: drawing from it, cutting it, ranking it.

The sampler on the host (`sampling`) and the one on the device (`gpu.sampling`) both call this, so
that they choose the same tokens. Nothing here waits for a device.

The weight of a token is `exp(logit - largest logit)` in integer units of 2**-42. Sums of integers
are exact in any order. So a row has the same sums alone and in any batch, over all tokens and over
candidates alone, and however a device divides the work.
"""

from __future__ import annotations

import torch

UNITS = 2.0**42
"""The weight of the most likely token. Sums fit 63 bits for a vocabulary of up to 2**20 tokens."""
SPARE = 108
"""How many more tokens than are ranked are looked at, for ties."""


def weights(logits: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """Int64 weights `[n, m]` of float32 logits; `largest` `[n, 1]` is the largest of each row."""
    return (logits - largest).exp_().mul_(UNITS).to(torch.int64)


def draw(
    logits: torch.Tensor,
    best: torch.Tensor,
    uniform: torch.Tensor,
    thresholds: torch.Tensor | None = None,
) -> torch.Tensor:
    """A token per row of float32 logits `[n, vocab]`, as int64 `[n]`.

    It is the first, in the order of ids, whose cumulative probability exceeds the row's number of
    `uniform` (float64 `[n]`, in [0, 1)). Logits below `thresholds` (float32 `[n]`) are left out.
    `best` (int64 `[n]`) is the first most likely token: the result where its logit is not finite.
    """
    largest = logits.gather(-1, best[:, None])
    if thresholds is not None:
        logits = logits.masked_fill(logits < thresholds[:, None], float("-inf"))
    tokens = invert(weights(logits, largest), uniform)
    return torch.where(largest[:, 0].isfinite(), tokens, best)


def invert(amounts: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Per row of int64 `amounts` `[n, m]`, the first index whose cumulative share exceeds
    `uniform`."""
    cumulative = amounts.cumsum(-1)
    # Even the largest uniform number, 1 - 2**-53, is not rounded up to the whole total.
    target = (uniform * cumulative[:, -1]).to(torch.int64)
    index = torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]
    return index.clamp_max(amounts.shape[-1] - 1)


def cutoff_of_best(
    best: torch.Tensor,
    vocab_size: int,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    totals: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The threshold below which logits are dropped, from the largest ones only.

    `best`: float32 `[n, m]`, the m largest logits of each row in descending order. `top_k` (int64;
    0 or at least `vocab_size`: off), `top_p` (float32; 1: off) and `min_p` (float32; 0: off) are
    `[n]`, and so are `totals`, the sums of the weights of all tokens. The cut is that of
    `gpu.kernels.cutoff`: ties with the last token kept are kept, each of the three applies to what
    the one before left. Returns float32 `[n]` and bool `[n]`: whether `best` has all that is kept.
    """
    count = best.shape[-1]
    off = float("-inf")
    limited = (top_k > 0) & (top_k < vocab_size)
    kth = best.gather(-1, torch.where(limited, top_k.clamp(1, count), count)[:, None] - 1)
    largest = best[:, :1]
    amounts = weights(best, largest) * (best >= kth)
    cumulative = amounts.cumsum(-1)
    totals = torch.where(limited, cumulative[:, -1], totals)
    unreached = (cumulative < (top_p.double() * totals)[:, None]).sum(-1)
    last = best.gather(-1, unreached.clamp_max(count - 1)[:, None])[:, 0]
    threshold = torch.where(limited & (top_k <= count), kth[:, 0], off)
    threshold = torch.where((top_p < 1.0) & (unreached < count), last, threshold)
    threshold = torch.maximum(threshold, largest[:, 0] + min_p.log())
    # Where not all that top-k keeps is among them, they do not say what top-p is a share of.
    unknown = limited & (kth[:, 0] <= best[:, -1]) & (top_p < 1.0)
    complete = ((threshold > best[:, -1]) & ~unknown) | (count >= vocab_size)
    return threshold, complete & largest[:, 0].isfinite()


def rank(
    logits: torch.Tensor, tokens: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities `[n]` of one token per row of float32 logits `[n, vocab]`, the ids of the
    `count` most likely ones `[n, count]`, best first, and their log-probabilities `[n, count]`.

    Of equally likely ones the smaller id comes first.
    """
    logprobs = logits.log_softmax(-1)
    chosen = logprobs.gather(-1, tokens[:, None])[:, 0]
    # Which of equal ones topk returns is undefined, so it returns more than are needed.
    values, ids = logits.topk(min(count + SPARE, logits.shape[-1]) if count else 0)
    ids, order = ids.sort(-1)
    order = values.gather(-1, order).sort(dim=-1, descending=True, stable=True).indices
    ids = ids.gather(-1, order)[:, :count]
    return chosen, ids, logprobs.gather(-1, ids)
