"""Which forward a model may be batched with, and which of its parts on our kernels: by proof.

Everything is compared with the model's own plain forward, in chunked and mixed steps over short
prompts. A model that no batched forward serves rightly is refused; parts that change it are undone.
"""

from __future__ import annotations

import logging
from copy import copy

import torch
from transformers import PreTrainedModel

from runners.contracts.errors import ConfigError
from runners.text.attention import PACKED
from runners.text.cpu import load_kernels, switch_off_kernels
from runners.text.cpu.decoder import fuse_decoder, unfuse_decoder
from runners.text.cpu.fusing import fuse_modules, unfuse_modules
from runners.text.cpu.linear import Quantization, pack_linears, unpack_linears
from runners.text.engine import RaggedEngine
from runners.text.forward import Batching, Forward, input_device
from runners.text.lockstep import Ranks, tells_of_loss
from runners.text.paging.blocks import BLOCK_SIZE
from runners.text.windows import narrow_windows

logger = logging.getLogger("triptych.ragged")

_KV_TOKENS = 256

PATIENCE_S = 60
"""How long a rank whose forward failed waits for the others to say so too."""


EXACT, HALF, QUANTIZED = 1e-3, 0.1, 0.5
"""How far logits may lie from the reference, in its standard deviations. Half precision differs in
its last bits between batch shapes, quantized weights by their rounding; wrong maths by more."""


class Proof:
    """A model's own logits, as it was loaded, and whether batched steps give the same.

    With `ranks`, all of them agree in everything, and what is proved may be split among them.
    """

    def __init__(self, model: PreTrainedModel, ranks: Ranks | None = None) -> None:
        self._model = model
        self._ranks = ranks
        self._tolerance = EXACT if model.dtype in (torch.float32, torch.float64) else HALF
        if ranks is None or ranks.leads:
            # Windows wider than the probe would prove nothing about how a path treats them.
            with narrow_windows(model):
                self._reference = _reference(model)
        else:
            self._reference = torch.empty(len(_probe(model)), _vocab_size(model))
        if ranks is not None:
            self._reference = ranks.share(self._reference)

    def of(self, model: PreTrainedModel) -> Proof:
        """The same proof for another copy of the model."""
        proof = copy(self)
        proof._model = model
        return proof

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
        try:
            with narrow_windows(self._model):
                ours = _batched(self._model, path)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever an architecture trips over, this is not its path
            if tells_of_loss(error):
                raise
            logger.info("%s on the %s path: %s", type(self._model).__name__, path, error)
            return self.agree(False, error)
        spread = max(float(self._reference.std()), 1e-3)
        most = (tolerance or self._tolerance) * spread
        return self.agree(
            bool(torch.isfinite(ours).all() and (ours - self._reference).abs().max() <= most)
        )

    def batches(self) -> bool:
        """Whether some path gives the logits it had, whatever else may."""
        try:
            self.choose()
        except ConfigError:
            return False
        return True

    def agree(self, own: bool, error: Exception | None = None) -> bool:
        """Whether it is so on every rank; `error` is why it is not on this one.

        Raises: ConfigError if the others know of no error, and wait for this rank elsewhere.
        """
        if self._ranks is None:
            return own
        try:
            return bool(self._ranks.smallest(own, patience=PATIENCE_S if error else None))
        except TimeoutError:
            raise ConfigError(
                f"{type(self._model).__name__} can not be split: a rank fails alone: {error}"
            ) from error


def prove_and_pack(
    model: PreTrainedModel, quantization: Quantization | None, proof: Proof | None = None
) -> Batching:
    """How the model is to be batched, with its linear layers packed where that is right.

    `proof` is of the model as it was before anything was done to it; made here if it is as loaded.
    Raises: ConfigError if no batching is right, or for a quantization that can not be done here.
    """
    proof = proof or Proof(model)
    path = proof.choose()
    kernels = load_kernels()
    if not proof.agree(kernels is not None) and kernels is not None:
        switch_off_kernels()  # another rank has none
        kernels = None
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


def _vocab_size(model: PreTrainedModel) -> int:
    return len(model.get_input_embeddings().weight)  # type: ignore[arg-type]


def _probe(model: PreTrainedModel) -> list[list[int]]:
    vocab_size = _vocab_size(model)
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


def _batched(model: PreTrainedModel, path: Batching) -> torch.Tensor:
    """The reference's logits, but from chunked, mixed steps over the probe."""
    blocks = _KV_TOKENS // BLOCK_SIZE
    engine = RaggedEngine(Forward(model, path, blocks=blocks), blocks=blocks)
    first, second = _probe(model)
    for uid, ids in ((1, first), (2, second)):
        engine.open(uid, ids)
        engine.extend(uid, len(ids))
    engine.put([1], [first[:4]])
    engine.put([1, 2], [first[4:-1], second[:-1]])
    return engine.put([1, 2], [first[-1:], second[-1:]])
