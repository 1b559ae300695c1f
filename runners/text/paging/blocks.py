"""Which KV blocks hold what: allocation, sharing of equal prompt heads, eviction. No tensors here.

Blocks are counted by reference. A full block is remembered by its tokens and everything before
them, so that a sequence which begins alike takes it over instead of computing it (automatic prefix
caching, as in vLLM). Blocks nobody uses stay remembered until their place is needed, least recently
used first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

BLOCK_SIZE = 32
"""Tokens of a block; kernels.cpp knows the same number."""

_ROOT = 0
_Key = tuple[int, tuple[int, ...]]


@dataclass(slots=True)
class SequenceBlocks:
    """The blocks of one sequence, in order, and the tokens whose KV they hold."""

    blocks: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    node: int = _ROOT
    """Stands for the remembered blocks so far; children are found by it."""
    remembered: int = 0

    @property
    def length(self) -> int:
        """Tokens whose KV exists."""
        return len(self.tokens)


class BlockAllocator:
    """`total` blocks of `BLOCK_SIZE` tokens."""

    def __init__(self, total: int, *, prefix_caching: bool = True) -> None:
        self.total = total
        self._caching = prefix_caching
        self._unused = list(range(total - 1, -1, -1))
        self._references = [0] * total
        # A remembered block's key is exact, no hash that could collide: (its parent, its tokens).
        self._found: dict[_Key, tuple[int, int]] = {}
        self._keys: dict[int, _Key] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._nodes = _ROOT

    @property
    def free(self) -> int:
        """Blocks that can be had, remembered ones nobody uses included."""
        return len(self._unused) + len(self._idle)

    def begin(self, tokens: Sequence[int]) -> SequenceBlocks:
        """A sequence that starts with what is remembered of `tokens`, all but the last at most."""
        sequence = SequenceBlocks()
        for start in range(0, len(tokens) - BLOCK_SIZE, BLOCK_SIZE):
            chunk = tuple(tokens[start : start + BLOCK_SIZE])
            if (found := self._found.get((sequence.node, chunk))) is None:
                break
            block, sequence.node = found
            self._references[block] += 1
            self._idle.pop(block, None)
            sequence.blocks.append(block)
            sequence.tokens += chunk
            sequence.remembered += 1
        return sequence

    def extend(self, sequence: SequenceBlocks, count: int) -> bool:
        """Make room for `count` more tokens; False, and nothing taken, if there is none."""
        needed = -(-(sequence.length + count) // BLOCK_SIZE) - len(sequence.blocks)
        if needed > self.free:
            return False
        for _ in range(needed):
            sequence.blocks.append(self._take())
        return True

    def commit(self, sequence: SequenceBlocks, tokens: Sequence[int]) -> None:
        """The KV of `tokens` was written behind what the sequence held."""
        sequence.tokens += tokens
        while self._caching and (sequence.remembered + 1) * BLOCK_SIZE <= sequence.length:
            start = sequence.remembered * BLOCK_SIZE
            key = (sequence.node, tuple(sequence.tokens[start : start + BLOCK_SIZE]))
            self._remember(sequence, key)

    def release(self, sequence: SequenceBlocks) -> None:
        """The sequence is done. Its last blocks are forgotten before its first."""
        for block in reversed(sequence.blocks):
            self._references[block] -= 1
            if self._references[block] == 0:
                if block in self._keys:
                    self._idle[block] = None
                else:
                    self._unused.append(block)
        sequence.blocks.clear()

    def _remember(self, sequence: SequenceBlocks, key: _Key) -> None:
        block = sequence.blocks[sequence.remembered]
        sequence.remembered += 1
        if (found := self._found.get(key)) is not None:
            # Computed twice at the same time: the first stays the one that is shared.
            sequence.node = found[1]
            return
        self._nodes += 1
        self._found[key] = block, self._nodes
        self._keys[block] = key
        sequence.node = self._nodes

    def _take(self) -> int:
        if self._unused:
            block = self._unused.pop()
        else:
            block, _ = self._idle.popitem(last=False)
            del self._found[self._keys.pop(block)]
        self._references[block] = 1
        return block
