"""MII's own engine (DeepSpeed FastGen's `InferenceEngineV2`) under our scheduler.

Its `put` allocates KV as it goes; our scheduler wants to know beforehand that there is room. So the
blocks are counted here, and what leaves is told to the engine with the next step. Several ranks run
the same steps in lockstep: a batch's block tables hold the sequences' ids, a sequence without
tokens is one that leaves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from transformers import GenerationConfig

from runners.config.mii import FASTGEN_BLOCK
from runners.config.model import MIITextConfig
from runners.contracts.runner import RunnerState
from runners.contracts.text import ModelInfo
from runners.engines.mii.defaults import mii_defaults
from runners.hf.models import loading
from runners.rank.process_group import connect, meet
from runners.rank.program import RankContext
from runners.text.engine import ModelRunner
from runners.text.loading import program_for_engine
from runners.text.lockstep import Follower, Leader, TPGroup
from runners.text.paging.batch import Batch
from runners.text.program import TextProgram


class PutEngine(Protocol):
    """What is used of `InferenceEngineV2`."""

    def put(
        self, batch_uids: list[int], batch_tokens: list[torch.Tensor], do_checks: bool = True
    ) -> torch.Tensor:
        """Append tokens to sequences; logits `[n, vocab]` of their last."""
        ...

    def flush(self, uid: int) -> None:
        """Forget a sequence."""
        ...


class PutModel:
    """See `engine.ModelRunner`: one rank's engine."""

    def __init__(self, engine: PutEngine) -> None:
        self._engine = engine
        self._known: set[int] = set()

    def run(self, batch: Batch) -> torch.Tensor:
        """Let go of the sequences without tokens, then one step of the others."""
        uids, tokens = [], []
        for new, (uid,) in zip(batch.tokens, batch.block_tables, strict=True):
            if new:
                uids.append(uid)
                tokens.append(torch.tensor(new))
            elif uid in self._known:
                self._known.discard(uid)
                self._engine.flush(uid)
        self._known.update(uids)
        if not uids:
            return torch.empty(0, 0)
        return self._engine.put(uids, tokens, do_checks=False).float().cpu()

    def idle(self) -> None:
        """Nobody waits for this process."""


class CountedEngine:
    """See `engine.Engine`: rank 0's, over `blocks` blocks of `block_size` tokens."""

    def __init__(self, model: ModelRunner, *, blocks: int, block_size: int) -> None:
        self._model = model
        self._block_size = block_size
        self._blocks = blocks
        self._lengths: dict[int, int] = {}
        self._held: dict[int, int] = {}
        self._leaving: list[int] = []

    @property
    def total_tokens(self) -> int:
        """Tokens the KV cache holds."""
        return self._blocks * self._block_size

    @property
    def free_tokens(self) -> int:
        """Tokens of KV that can still be had, in whole blocks."""
        return (self._blocks - sum(self._held.values())) * self._block_size

    def open(self, uid: int, tokens: Sequence[int]) -> int:
        """Begin a sequence; this engine shares no KV, so all of it is computed: 0."""
        self._lengths[uid] = self._held[uid] = 0
        return 0

    def extend(self, uid: int, count: int) -> bool:
        """Make room for `count` more tokens. False, and nothing taken, if there is none."""
        needed = -(-(self._lengths[uid] + count) // self._block_size) - self._held[uid]
        if needed * self._block_size > self.free_tokens:
            return False
        self._held[uid] += max(0, needed)
        return True

    def put(self, uids: Sequence[int], tokens: Sequence[Sequence[int]]) -> torch.Tensor:
        """Append `tokens[i]` to sequence `uids[i]`; last-token logits `[n, vocab]`."""
        leaving, self._leaving = self._leaving, []
        batch = Batch(
            [*([] for _ in leaving), *map(list, tokens)],
            [*(0 for _ in leaving), *(self._lengths[uid] for uid in uids)],
            [[uid] for uid in (*leaving, *uids)],
        )
        logits = self._model.run(batch)
        for uid, new in zip(uids, tokens, strict=True):
            self._lengths[uid] += len(new)
        return logits

    def flush(self, uid: int) -> None:
        """Forget a sequence and free its KV. Unknown ids are ignored."""
        if self._lengths.pop(uid, 0):
            self._leaving.append(uid)
        self._held.pop(uid, None)

    def idle(self) -> None:
        """There is nothing to compute for now: what left gives its KV back."""
        if self._leaving:
            self.put([], [])
        else:
            self._model.idle()


def load_fastgen(context: RankContext, config: MIITextConfig) -> TextProgram | Follower:
    """The program over MII's engine, on this rank's GPU. Raises: ConfigError."""
    import mii.modeling.models

    group = None
    if config.tensor_parallel > 1:
        group = TPGroup(connect(config, meet(context)).control)
    context.progress(RunnerState.LOADING, "building FastGen's kernels and loading the weights")
    with loading(config.name):
        engine: Any = mii.modeling.models.load_model(mii_model_config(config))
    model = engine.model()
    block_size = int(model.kv_block_size if hasattr(model, "kv_block_size") else _block(model))
    blocks = int(min(engine.free_blocks))
    if group is not None:
        blocks = group.all_reduce_min(blocks)
    own = engine._policy._checkpoint_engine.model_config
    info = ModelInfo(
        architecture=(own.architectures or [type(model).__name__])[0],
        engine=config.engine,
        parameters=sum(p.numel() for p in model.parameters()) * config.tensor_parallel,
        dtype=str(model.activation_dtype).rpartition(".")[2],
        devices=[f"cuda:{rank}" for rank in range(config.tensor_parallel)],
        max_context=min(own.max_seq_length, config.mii.max_total_tokens),
        vocab_size=own.vocab_size,
        max_kv_tokens=blocks * block_size,
        has_chat_template=False,
    )
    put: ModelRunner = PutModel(engine)
    if group is not None and not group.is_leader:
        return Follower(put, group, info)
    counted = CountedEngine(
        put if group is None else Leader(put, group), blocks=blocks, block_size=block_size
    )
    file = config.model_path / "generation_config.json"
    generation = GenerationConfig.from_pretrained(config.model_path) if file.is_file() else None
    defaults = mii_defaults(config.mii.generate, generation)
    return program_for_engine(
        context, counted, info, generation_config=generation, defaults=defaults
    )


def mii_model_config(config: MIITextConfig) -> Any:
    """Our config as MII's `ModelConfig`."""
    from mii.config import ModelConfig

    return ModelConfig(**model_values(config))


def model_values(config: MIITextConfig) -> dict[str, Any]:
    """Our config as what MII's `ModelConfig` is made of."""
    section = config.mii
    manager = section.inference_engine_config.state_manager.model_dump() | {
        "max_ragged_batch_size": max(config.max_step_tokens, config.max_batch_size),
        "max_ragged_sequence_count": config.max_batch_size,
    }
    manager["max_tracked_sequences"] = max(
        manager["max_tracked_sequences"], 2 * config.max_batch_size
    )
    if config.max_kv_tokens is not None:
        size = max(1, config.max_kv_tokens // FASTGEN_BLOCK)
        manager["memory_config"] = {"mode": "allocate", "size": size}
    taken = {"sync_debug", "profile_model_time", "replica_num"}
    quantization = (
        section.quantization_mode or section.inference_engine_config.quantization.quantization_mode
    )
    return section.model_dump(include=taken) | {
        "model_name_or_path": str(config.model_path),
        "tensor_parallel": config.tensor_parallel,
        "max_length": section.max_length or section.generate.max_length,
        "quantization_mode": quantization,
        "inference_engine_config": {"state_manager": manager},
    }


def _block(model: Any) -> int:
    """Tokens of a block, of the first of its cache's groups."""
    return int(model.kv_cache_config()[0].block_size)
