"""Part b: the tokens of `generate(do_sample=False)`, and the same bits however a step is made up.

Float32 tokens must be equal. In bfloat16 the shapes of a batch round differently, so the first
difference may be a near tie: two logits of the reference that are closer than its rounding.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.gpu_check.device import Device
from benchmarks.gpu_check.models import SHAPES, small_model
from benchmarks.gpu_check.part import Context
from benchmarks.gpu_check.session import Output, Prompts, Session, supported
from tests.support.models import VOCAB

TOP = 5
ROUNDING = 8 * torch.finfo(torch.bfloat16).eps
"""Largest difference of near ties, relative to the largest logit: eight units in the last place."""
BATCH, CHUNK, KV_TOKENS = 16, 16, 8192
GROWING = 4
"""Prompts just below a KV block in length, which all need a second block at the same time."""
TIGHT_KV_TOKENS = 6 * 32
"""Too few for two blocks of each of them."""


class Reference(NamedTuple):
    """Greedy tokens of one prompt and the logits they were chosen by, `[count, vocab]`."""

    tokens: list[int]
    logits: torch.Tensor


class Mode(NamedTuple):
    """Options of a session that must not change a result."""

    options: dict[str, Any]
    preempted: bool = False


MODES = {
    "eager": Mode({"cuda_graphs": False, "overlap": False}),
    "graphs": Mode({"cuda_graphs": True, "overlap": False}),
    "overlap": Mode({"cuda_graphs": True, "overlap": True}),
    "chunked": Mode({"max_step_tokens": CHUNK}),
    "preempted": Mode({"prefix_caching": False}, preempted=True),
}
"""Beside these, each prompt alone is the base that logprobs are compared with, bit by bit."""


class Case(NamedTuple):
    """A model, and what `generate` gives for its prompts."""

    name: str
    folder: Path
    dtype: torch.dtype
    references: list[Reference]


def run(check: Context) -> None:
    """Every architecture in every type."""
    absent = sorted({k for m in MODES.values() for k in m.options} - supported_keys())
    if absent:
        check.record.skip("options", f"this version has no {', '.join(absent)}")
    prompts = make_prompts(check.device)
    # All of them, because the first session replaces operators of this process.
    cases = list(_cases(check, prompts))
    for case in cases:
        with _others_go_on(check, case.name):
            _check_model(check, case, prompts)
        check.device.release()


def _cases(check: Context, prompts: Prompts) -> Iterator[Case]:
    """Every model that `generate` runs."""
    for kind in check.device.pick(list(SHAPES), ["gemma3"]):
        for dtype in check.device.pick((torch.float32, torch.bfloat16), (torch.float32,)):
            name = f"{kind} {dtype}".replace("torch.", "")
            with _others_go_on(check, name):
                folder = small_model(kind, dtype, check.folder)
                references = generate(check.device, folder, prompts, _count(check.device))
                yield Case(name, folder, dtype, references)


@contextmanager
def _others_go_on(check: Context, name: str) -> Iterator[None]:
    """Record the failure of a model."""
    try:
        yield
    except Exception as error:  # of any library
        traceback.print_exc()
        check.record.check(f"{name} runs", False, f"{type(error).__name__}: {error}"[:300])


def _count(device: Device) -> int:
    """Tokens that are generated."""
    count: int = device.pick(32, 6)
    return count


def supported_keys() -> set[str]:
    """The options of `MODES` that this version has."""
    return set(supported(**{key: None for mode in MODES.values() for key in mode.options}))


def _check_model(check: Context, case: Case, prompts: Prompts) -> None:
    name, folder, dtype, references = case
    growing = slice(-GROWING, None)
    count = _count(check.device)
    session = Session(check.device, folder, max_batch_size=BATCH, max_kv_tokens=KV_TOKENS)
    if session.invariance not in check.record.result["headlines"]:
        check.record.headline(session.invariance)
    alone = [session.generate([p], count, logprobs=TOP)[0] for p in prompts]
    again = session.generate(prompts, count, logprobs=TOP)
    compare(check, f"{name} alone", alone, references, dtype)
    same_bits(check, f"{name} batched after a prefix hit", again, alone)
    del session
    for mode_name, mode in MODES.items():
        chosen = growing if mode.preempted else slice(None)
        options = {"max_kv_tokens": TIGHT_KV_TOKENS if mode.preempted else KV_TOKENS}
        session = Session(check.device, folder, max_batch_size=BATCH, **options | mode.options)
        outputs = session.generate(prompts[chosen], count, logprobs=TOP)
        compare(check, f"{name} {mode_name}", outputs, references[chosen], dtype)
        same_bits(check, f"{name} {mode_name}", outputs, alone[chosen])
        if mode.preempted:
            times = session.scheduler.preemptions
            check.record.check(f"{name} was preempted", times > 0, f"{times} times")
        del session


def make_prompts(device: Device) -> list[list[int]]:
    """Prompts of lengths around the borders of KV blocks and of splits, and longer ones."""
    lengths = device.pick((1, 31, 32, 33, 100, 255, 257, 600), (1, 33, 70))
    random = torch.Generator().manual_seed(1)
    lengths += (30,) * GROWING
    return [torch.randint(2, VOCAB, (n,), generator=random).tolist() for n in lengths]


def generate(device: Device, folder: Path, prompts: Prompts, count: int) -> list[Reference]:
    """`model.generate(do_sample=False)` of each prompt alone, on the device.

    On a CPU Triptych computes in float32, whatever the type of the weights.
    Raises: RuntimeError as `Device.require_stock`.
    """
    device.require_stock()
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    model.to(device.target)
    if device.dry:
        model.float()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 1
    references = []
    for prompt in prompts:
        inputs = torch.tensor([list(prompt)], device=device.target)
        result = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            do_sample=False,
            max_new_tokens=count,
            return_dict_in_generate=True,
            output_logits=True,
        )
        logits = torch.cat(result.logits).float().cpu()
        references.append(Reference(result.sequences[0, len(prompt) :].tolist(), logits))
    del model
    device.release()
    return references


def compare(
    check: Context,
    name: str,
    outputs: Sequence[Output],
    references: Sequence[Reference],
    dtype: torch.dtype,
) -> bool:
    """Check tokens against the reference's, and report the margins of near ties."""
    problems: list[str] = []
    ties: list[str] = []
    for number, (output, reference) in enumerate(zip(outputs, references, strict=True)):
        if output.error is not None or len(output.tokens) != len(reference.tokens):
            problems.append(f"prompt {number}: {output.error or f'{len(output.tokens)} tokens'}")
            continue
        step = first_difference(output.tokens, reference.tokens)
        if step is None:
            continue
        share = margin(reference, step, output.tokens[step])
        text = f"prompt {number} from token {step} on, margin {share:.2g} of the largest logit"
        is_tie = dtype != torch.float32 and share <= ROUNDING
        (ties if is_tie else problems).append(text)
    equal = len(outputs) - len(problems) - len(ties)
    detail = f"{equal} of {len(outputs)} equal"
    detail += "".join(f"; differs: {p}" for p in problems) + "".join(f"; tie: {t}" for t in ties)
    return check.record.check(f"{name}: tokens of generate", not problems, detail)


def same_bits(check: Context, name: str, outputs: Sequence[Output], base: Sequence[Output]) -> bool:
    """Check that tokens and logprobs equal those of each prompt alone.

    A dry run on the path of a GPU only records it: torch's matrix products on a CPU round by the
    number of rows.
    """
    differences = [
        f"prompt {number}: {_first_bits(output, other)}"
        for number, (output, other) in enumerate(zip(outputs, base, strict=True))
        if (output.tokens, output.logprobs) != (other.tokens, other.logprobs)
    ]
    detail = f"{len(outputs) - len(differences)} of {len(outputs)} equal"
    detail += "".join(f"; {difference}" for difference in differences[:2])
    if check.device.dry and supported(attention_kernel="torch"):
        check.record.figure(f"{name}: same bits as alone", detail)
        return True
    return check.record.check(f"{name}: same bits as alone", not differences, detail)


def first_difference(tokens: Sequence[int], others: Sequence[int]) -> int | None:
    """The index of the first token that differs."""
    pairs = enumerate(zip(tokens, others, strict=True))
    return next((i for i, (a, b) in pairs if a != b), None)


def margin(reference: Reference, step: int, token: int) -> float:
    """By how much the reference prefers its own token, relative to its largest logit."""
    row = reference.logits[step]
    return float((row[reference.tokens[step]] - row[token]) / row.abs().max())


def _first_bits(output: Output, other: Output) -> str:
    pairs = enumerate(zip(output.logprobs, other.logprobs, strict=False))
    for step, (a, b) in pairs:
        if a != b:
            apart = max(abs(x - y) for x, y in zip(a, b, strict=True))
            return f"logprobs from token {step} on, by {apart:.2g}"
    return output.error or "another number of tokens"
