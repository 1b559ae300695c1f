"""FastGen's engine (`InferenceEngineV2`) under Triptych's scheduler, in ranks of mode `pipeline`.

FastGen's `put` allocates KV as it goes, while the scheduler has to know beforehand whether there is
room. The blocks are therefore counted here, and a sequence is flushed with the step after it ends.
Several ranks run the same steps: the block tables of a step hold the ids of its sequences, and a
sequence without tokens is one to flush.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from typing_extensions import override

from runners.config.mii import FASTGEN_BLOCK
from runners.config.model import MIITextConfig
from runners.contracts.runner import RunnerState
from runners.contracts.text import ModelInfo
from runners.engines.mii.defaults import load_generation_config, mii_defaults
from runners.hf.models import loading
from runners.rank.process_group import connect, meet
from runners.rank.program import RankContext
from runners.text.engine import Engine, ModelRunner, PendingStep, Row, launch
from runners.text.gpu.sampling import DeviceSampler
from runners.text.loading import program_for_engine
from runners.text.lockstep import Follower, Leader, TPGroup
from runners.text.paging.batch import Batch
from runners.text.program import TextProgram
from runners.text.samplers import Sampler

logger = logging.getLogger("triptych.mii")

IGNORED = frozenset(
    {
        *("attention_kernel", "kv_cache_dtype", "cuda_graphs", "graph_memory", "overlap"),
        *("batch_invariant", "gpu_memory_share", "prefix_caching", "cpu_kernels"),
    }
)
"""Fields that FastGen has no counterpart for."""


class InferenceEngine(Protocol):
    """The members of `InferenceEngineV2` that are used here."""

    def put(
        self, batch_uids: list[int], batch_tokens: list[torch.Tensor], do_checks: bool = True
    ) -> torch.Tensor:
        """Append tokens to sequences; returns logits `[n, vocab]` of their last tokens."""
        ...

    def flush(self, uid: int) -> None:
        """Free a sequence."""
        ...


class FastGenModel(ModelRunner):
    """One rank's engine as a model that runs steps."""

    def __init__(self, engine: InferenceEngine) -> None:
        self._engine = engine
        self._sequences: set[int] = set()

    @override
    def run(self, batch: Batch) -> torch.Tensor:
        uids, tokens = [], []
        for new, (uid,) in zip(batch.tokens, batch.block_tables, strict=True):
            if new:
                uids.append(uid)
                tokens.append(torch.tensor(new))
            elif uid in self._sequences:
                self._sequences.discard(uid)
                self._engine.flush(uid)
        self._sequences.update(uids)
        if not uids:
            return torch.empty(0, 0)
        logits = self._engine.put(uids, tokens, do_checks=False)
        wanted = [w for w, new in zip(batch.wanted, batch.tokens, strict=True) if new]
        return logits if all(wanted) else logits[[i for i, w in enumerate(wanted) if w]]

    @override
    def feed(self, tokens: torch.Tensor) -> None:
        raise NotImplementedError  # its batches have known tokens only

    @override
    def shrink(self) -> int | None:
        return None  # FastGen's KV cache has a fixed size

    @override
    def idle(self) -> None:
        pass  # no other rank waits for this one


class FastGenEngine(Engine):
    """Rank 0's engine over `blocks` KV blocks of `block_size` tokens, which it counts."""

    def __init__(
        self, model: ModelRunner, sampler: Sampler, *, blocks: int, block_size: int
    ) -> None:
        self._model = model
        self._sampler = sampler
        self._block_size = block_size
        self._blocks = blocks
        self._lengths: dict[int, int] = {}
        self._block_counts: dict[int, int] = {}
        self._to_flush: list[int] = []

    @property
    @override
    def total_tokens(self) -> int:
        return self._blocks * self._block_size

    @property
    @override
    def free_tokens(self) -> int:
        return (self._blocks - sum(self._block_counts.values())) * self._block_size

    @override
    def open(self, uid: int, tokens: Sequence[int]) -> int:
        self._lengths[uid] = self._block_counts[uid] = 0
        return 0  # FastGen shares no KV between sequences

    @override
    def extend(self, uid: int, count: int) -> bool:
        needed = -(-(self._lengths[uid] + count) // self._block_size) - self._block_counts[uid]
        if needed * self._block_size > self.free_tokens:
            return False
        self._block_counts[uid] += max(0, needed)
        return True

    @property
    @override
    def overlaps(self) -> bool:
        return False  # FastGen takes tokens from the host

    @override
    def submit(self, rows: Sequence[Row]) -> PendingStep:
        flushed, self._to_flush = self._to_flush, []
        batch = Batch(
            [*([] for _ in flushed), *(list(row.tokens) for row in rows)],
            [*(0 for _ in flushed), *(self._lengths[row.uid] for row in rows)],
            [array("i", [uid]) for uid in (*flushed, *(row.uid for row in rows))],
            [*(False for _ in flushed), *(row.sampler is not None for row in rows)],
        )
        logits = self._model.run(batch)
        for row in rows:
            self._lengths[row.uid] += len(row.tokens)
        return launch(self._sampler, logits, [row for row in rows if row.sampler is not None])

    @override
    def flush(self, uid: int) -> None:
        if self._lengths.pop(uid, 0):
            self._to_flush.append(uid)
        self._block_counts.pop(uid, None)

    @override
    def shrink(self) -> bool:
        return False

    @override
    def idle(self) -> None:
        if self._to_flush:
            self.submit([])
        else:
            self._model.idle()


def load_fastgen(context: RankContext, config: MIITextConfig) -> TextProgram | Follower:
    """The program over FastGen's engine, on this rank's GPU. Raises: ConfigError."""
    if ignored := sorted(config.model_fields_set & IGNORED):
        logger.warning("%s: FastGen ignores %s", config.name, ", ".join(ignored))
    # MII takes seconds, and mode `persistent` needs only `model_values` of this module.
    import mii.modeling.models

    group = None
    if config.tensor_parallel > 1:
        group = TPGroup(connect(config, meet(context)).control)
    context.progress(RunnerState.LOADING, "building FastGen's kernels and loading the weights")
    with loading(config.name):
        engine: Any = mii.modeling.models.load_model(mii_model_config(config))
    model = engine.model()
    block_size = _block_size(model)
    blocks = int(min(engine.free_blocks))
    if group is not None:
        blocks = group.all_reduce_min(blocks)
    model_config = engine._policy._checkpoint_engine.model_config
    info = ModelInfo(
        architecture=(model_config.architectures or [type(model).__name__])[0],
        engine=config.engine,
        parameters=sum(p.numel() for p in model.parameters()) * config.tensor_parallel,
        dtype=str(model.activation_dtype).rpartition(".")[2],
        devices=[f"cuda:{rank}" for rank in range(config.tensor_parallel)],
        max_context=min(model_config.max_seq_length, config.mii.max_total_tokens),
        vocab_size=model_config.vocab_size,
        max_kv_tokens=blocks * block_size,
        has_chat_template=False,
    )
    rank_model = FastGenModel(engine)
    if group is not None and not group.is_leader:
        return Follower(rank_model, group, info)
    group_model: ModelRunner = rank_model if group is None else Leader(rank_model, group)
    generation = load_generation_config(config.model_path)
    return program_for_engine(
        context,
        FastGenEngine(
            group_model,
            DeviceSampler(torch.device("cuda", torch.cuda.current_device()), info.vocab_size),
            blocks=blocks,
            block_size=block_size,
        ),
        info,
        generation_config=generation,
        defaults=mii_defaults(config.mii.generate, generation),
    )


def mii_model_config(config: MIITextConfig) -> Any:
    """The config as MII's `ModelConfig`."""
    from mii.config import ModelConfig  # as in `load_fastgen`

    return ModelConfig(**model_values(config))


def model_values(config: MIITextConfig) -> dict[str, Any]:
    """The config as values for MII's `ModelConfig`."""
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
    same_fields = {"sync_debug", "profile_model_time", "replica_num"}
    quantization = (
        section.quantization_mode or section.inference_engine_config.quantization.quantization_mode
    )
    return section.model_dump(include=same_fields) | {
        "model_name_or_path": str(config.model_path),
        "tensor_parallel": config.tensor_parallel,
        "max_length": section.max_length or section.generate.max_length,
        "quantization_mode": quantization,
        "inference_engine_config": {"state_manager": manager},
    }


def _block_size(model: Any) -> int:
    """Tokens of a KV block, of the first group where there are several."""
    if hasattr(model, "kv_block_size"):
        return int(model.kv_block_size)
    return int(model.kv_cache_config()[0].block_size)
