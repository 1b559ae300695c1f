"""Which forward a model may be batched with, and which of its parts on our kernels: by proof.

Everything is compared with the model's own plain forward, in chunked and mixed steps over short
prompts. A model that no batched forward serves rightly is refused; parts that change it are undone.
"""

from __future__ import annotations

import logging

import torch
from transformers import PreTrainedModel

from runners.errors import ConfigError
from runners.ragged.attention import PACKED
from runners.ragged.blocks import BLOCK_SIZE
from runners.ragged.cpu import load_kernels
from runners.ragged.cpu.decoder import fuse_decoder, unfuse_decoder
from runners.ragged.cpu.fusing import fuse_modules, unfuse_modules
from runners.ragged.cpu.linear import Quantization, pack_linears, unpack_linears
from runners.ragged.engine import Batching, RaggedEngine, input_device
from runners.ragged.windows import narrow_windows

logger = logging.getLogger("triptych.ragged")

_KV_TOKENS = 256


EXACT, HALF, QUANTIZED = 1e-3, 0.1, 0.5
"""How far logits may lie from the reference, in its standard deviations. Half precision differs in
its last bits between batch shapes, quantized weights by their rounding; wrong maths by more."""


class Proof:
    """A model's own logits, as it was loaded, and whether batched steps give the same."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._tolerance = EXACT if model.dtype in (torch.float32, torch.float64) else HALF
        # Windows wider than the probe would prove nothing about how a path treats them.
        with narrow_windows(model):
            self._reference = _reference(model)

    def choose(self) -> Batching:
        """The forward that is right; sets the model's attention. Raises: ConfigError."""
        model = self._model
        usual = model.config._attn_implementation
        if getattr(model, "_supports_attention_backend", False):
            model.set_attn_implementation(PACKED)
            if self.holds("packed"):
                return "packed"
            model.set_attn_implementation(usual)
        if self.holds("padded"):
            return "padded"
        raise ConfigError(
            f"{type(model).__name__} can not be batched continuously: its logits with a KV "
            "cache differ from its own plain forward"
        )

    def holds(self, path: Batching, *, tolerance: float | None = None) -> bool:
        """Whether the model, as it is now, still gives the logits it had."""
        with narrow_windows(self._model):
            return _matches(self._model, path, self._reference, tolerance or self._tolerance)


def prove_and_pack(model: PreTrainedModel, quantization: Quantization | None) -> Batching:
    """How the model is to be batched, with its linear layers packed where that is right.

    Raises: ConfigError if no batching is right, or for a quantization that can not be done here.
    """
    proof = Proof(model)
    path = proof.choose()
    kernels = load_kernels()
    if kernels is None:
        if quantization is not None:
            raise ConfigError(
                "weight_quantization needs the CPU kernels, which are switched off or could not be "
                "compiled (the log says why); they need a C++ compiler such as g++"
            )
        return path
    if not pack_linears(model, kernels, quantization):
        if quantization is not None:
            raise ConfigError(
                "weight_quantization is for models computed in float32 on a CPU; this one is not"
            )
        return path
    tolerance = None if quantization is None else QUANTIZED
    fuse_modules(model, kernels)
    if path == "packed":
        fuse_decoder(model, kernels)
    for undo in (unfuse_decoder, unfuse_modules):
        if proof.holds(path, tolerance=tolerance):
            return path
        undo(model)
    if not proof.holds(path, tolerance=tolerance):
        if quantization is not None:
            raise ConfigError(
                f"{type(model).__name__} does not bear weight_quantization {quantization}: "
                "its logits become others"
            )
        logger.warning("%s runs without the CPU kernels: they change it", type(model).__name__)
        unpack_linears(model)
    return path


def _probe(model: PreTrainedModel) -> list[list[int]]:
    vocab_size = len(model.get_input_embeddings().weight)  # type: ignore[arg-type]
    # The first crosses into a second block of KV.
    return [
        [(7 * i + 3 + k) % vocab_size for i in range(n)] for k, n in enumerate((BLOCK_SIZE + 9, 9))
    ]


@torch.inference_mode()
def _reference(model: PreTrainedModel) -> torch.Tensor:
    """Last-token logits of two short prompts by the model's own forward, without any cache."""
    model.train(False)
    device = input_device(model)
    return torch.cat(
        [
            model(input_ids=torch.tensor([ids], device=device), use_cache=False)
            .logits[:, -1]
            .float()
            .cpu()
            for ids in _probe(model)
        ]
    )


def _matches(
    model: PreTrainedModel, path: Batching, reference: torch.Tensor, tolerance: float
) -> bool:
    """Whether chunked, mixed steps over the probe end in the reference's logits."""
    engine = RaggedEngine(model, path, kv_tokens=_KV_TOKENS)
    first, second = _probe(model)
    for uid, ids in ((1, first), (2, second)):
        engine.open(uid, ids)
        engine.extend(uid, len(ids))
    try:
        engine.put([1], [first[:4]])
        engine.put([1, 2], [first[4:-1], second[:-1]])
        ours = engine.put([1, 2], [first[-1:], second[-1:]])
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever an architecture trips over, this is not its path
        logger.info("%s on the %s path: %s", type(model).__name__, path, error)
        return False
    spread = max(float(reference.std()), 1e-3)
    return bool(torch.isfinite(ours).all() and (ours - reference).abs().max() <= tolerance * spread)
