"""Allocation of KV blocks: reference counts, prefix caching, eviction. No tensors here.

A full block is cached under its tokens and all tokens before them. A sequence with the same
beginning shares the block instead of computing it (automatic prefix caching, as in vLLM). Blocks
that no sequence uses stay cached until they are needed; the least recently used is evicted first.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

BLOCK_SIZE = 32
"""Tokens of a block; `BLOCK` in attention.h has to be the same number."""

PENDING = -1
"""In place of a token that is computed before it is known."""

_ROOT = 0
_Key = tuple[int, tuple[int, ...]]


@dataclass(slots=True)
class SequenceBlocks:
    """The blocks of one sequence, in order, and the tokens whose KV they hold."""

    blocks: array[int] = field(default_factory=lambda: array("i"))
    tokens: list[int] = field(default_factory=list)
    prefix: int = _ROOT
    """Identifies the tokens of its cached blocks."""
    cached: int = 0
    """Number of its blocks that are cached, the first ones."""

    @property
    def length(self) -> int:
        """Number of tokens whose KV exists."""
        return len(self.tokens)


def fewer(blocks: int) -> int | None:
    """How many of `blocks` a cache keeps that is made smaller; None if that is none."""
    return blocks * 9 // 10 or None


class BlockAllocator:
    """`total` blocks of `BLOCK_SIZE` tokens each."""

    def __init__(self, total: int, *, prefix_caching: bool = True) -> None:
        self.total = total
        self._prefix_caching = prefix_caching
        self._unused = list(range(total - 1, -1, -1))
        self._references = [0] * total
        # Keys are (prefix, tokens) themselves: a hash of them could collide.
        self._cache: dict[_Key, tuple[int, int]] = {}  # to block, and prefix with its tokens
        self._keys: dict[int, _Key] = {}  # per cached block
        self._evictable: OrderedDict[int, None] = OrderedDict()
        self._last_prefix = _ROOT

    @property
    def free(self) -> int:
        """Number of blocks that can be allocated, including cached ones that can be evicted."""
        return len(self._unused) + len(self._evictable)

    def begin(self, tokens: Sequence[int]) -> SequenceBlocks:
        """A sequence that starts with the cached blocks of `tokens`, except the last token."""
        sequence = SequenceBlocks()
        for start in range(0, len(tokens) - BLOCK_SIZE, BLOCK_SIZE):
            chunk = tuple(tokens[start : start + BLOCK_SIZE])
            if (entry := self._cache.get((sequence.prefix, chunk))) is None:
                break
            block, sequence.prefix = entry
            self._references[block] += 1
            self._evictable.pop(block, None)
            sequence.blocks.append(block)
            sequence.tokens += chunk
            sequence.cached += 1
        return sequence

    def extend(self, sequence: SequenceBlocks, count: int) -> bool:
        """Allocate blocks for `count` more tokens. False, with nothing allocated, if too few are
        free."""
        needed = -(-(sequence.length + count) // BLOCK_SIZE) - len(sequence.blocks)
        if needed > self.free:
            return False
        for _ in range(needed):
            sequence.blocks.append(self._allocate())
        return True

    def commit(self, sequence: SequenceBlocks, tokens: Sequence[int]) -> None:
        """Append `tokens`, whose KV is written; caches the blocks that are full now.

        The last token may be `PENDING`: its block is not cached before it is known.
        """
        sequence.tokens += tokens
        known = sequence.length - (sequence.tokens[-1:] == [PENDING])
        while self._prefix_caching and (sequence.cached + 1) * BLOCK_SIZE <= known:
            start = sequence.cached * BLOCK_SIZE
            key = (sequence.prefix, tuple(sequence.tokens[start : start + BLOCK_SIZE]))
            self._cache_block(sequence, key)

    def resolve(self, sequence: SequenceBlocks, token: int) -> None:
        """Replace the `PENDING` token of a sequence that ends with one."""
        if sequence.tokens[-1:] == [PENDING]:
            sequence.tokens.pop()
            self.commit(sequence, [token])

    def release(self, sequence: SequenceBlocks) -> None:
        """Give up all blocks of a sequence. Its last blocks are evicted before its first."""
        for block in reversed(sequence.blocks):
            self._references[block] -= 1
            if self._references[block] == 0:
                if block in self._keys:
                    self._evictable[block] = None
                else:
                    self._unused.append(block)
        del sequence.blocks[:]

    def _cache_block(self, sequence: SequenceBlocks, key: _Key) -> None:
        block = sequence.blocks[sequence.cached]
        sequence.cached += 1
        if (entry := self._cache.get(key)) is not None:
            # Two sequences computed it at the same time: the first block stays the shared one.
            sequence.prefix = entry[1]
            return
        self._last_prefix += 1
        self._cache[key] = block, self._last_prefix
        self._keys[block] = key
        sequence.prefix = self._last_prefix

    def _allocate(self) -> int:
        if self._unused:
            block = self._unused.pop()
        else:
            block, _ = self._evictable.popitem(last=False)
            del self._cache[self._keys.pop(block)]
        self._references[block] = 1
        return block
