"""The logit below which top-k, top-p and min-p drop tokens, per row, without a wait for the device.

As in transformers' `generate`, the order is top-k, top-p, min-p, each on what the one before left.
Tokens that tie with the last one kept are kept.

- top-k keeps the tokens `x >= t_k`, where `t_k` is the k-th largest logit.
- top-p keeps the fewest most probable of these whose probability, renormalised, reaches p: the
  tokens `x >= t_p`, where `t_p` is the largest logit with `mass(x >= t_p) >= p * mass(x >= t_k)`.
- min-p keeps the tokens whose probability is at least `min_p` times the largest one:
  `x >= max(x) + log(min_p)`.

Masses are sums of `exp(x - max(x))` in float64.
"""

from __future__ import annotations

import torch

from runners.text.gpu.kernels import interpreted, runs_on


def cutoff(
    logits: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    *,
    in_interpreter: bool = False,
) -> torch.Tensor:
    """Float32 `[n]`, per row the threshold t: the tokens with `logit >= t` are kept.

    Takes float32 logits `[n, vocab]`, already divided by the temperature, and per row `top_k`
    (int32 `[n]`; 0 or at least vocab: off), `top_p` (float32 `[n]`; 1: off) and `min_p` (float32
    `[n]`; 0: off). If all three are off the threshold is -inf. The largest logit is always kept.
    The result of a row with NaN means nothing. On CUDA a row's bits do not depend on the others.
    `in_interpreter` runs the kernel on CPU tensors in Triton's interpreter.
    """
    use_kernel = logits.device.type == "cuda" or (in_interpreter and interpreted())
    if use_kernel and runs_on(logits.device):
        from runners.text.gpu.kernels.cutoff_kernel import launch

        threshold: torch.Tensor = launch(logits, top_k, top_p, min_p)
        return threshold
    return cutoff_torch(logits, top_k, top_p, min_p)


def cutoff_torch(
    logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> torch.Tensor:
    """`cutoff` with torch's sort, which every device has. It never waits for the device."""
    vocab = logits.shape[-1]
    sorted_logits = logits.sort(-1, descending=True).values
    largest = sorted_logits[:, :1]
    k = torch.where((top_k <= 0) | (top_k > vocab), vocab, top_k).to(torch.int64)[:, None]
    # With top-k off this is the smallest logit, so all are kept.
    smallest = sorted_logits.gather(-1, k - 1)
    weights = torch.where(sorted_logits < largest, (sorted_logits - largest).exp(), 1.0).double()
    weights = weights.masked_fill(sorted_logits < smallest, 0.0)
    cumulative = weights.cumsum(-1)
    reached = (cumulative >= top_p.double()[:, None] * cumulative[:, -1:]).to(torch.int8)
    p_threshold = sorted_logits.gather(-1, reached.argmax(-1, keepdim=True))
    off = torch.full_like(largest, float("-inf"))
    threshold = torch.where(k < vocab, smallest, off)
    threshold = torch.where(top_p[:, None] < 1.0, p_threshold, threshold)
    return torch.maximum(threshold, largest + min_p.log()[:, None])[:, 0]
