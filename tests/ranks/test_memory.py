"""What a rank holds of a model that is split: its share, at no time the whole."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import transformers as tf

from tests.support.generating import collect, serving
from tests.support.models import EOS, write_model, write_tokenizer
from tests.support.processes import own_ranks

pytest.importorskip("deepspeed")


def write_large(folder: Path, dtype: torch.dtype) -> Path:
    """A Llama of half a billion parameters."""
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=8192,
        hidden_size=2048,
        intermediate_size=5504,
        num_hidden_layers=10,
        num_attention_heads=16,
        bos_token_id=0,
        eos_token_id=EOS,
        max_position_embeddings=512,
    )
    model = tf.AutoModelForCausalLM.from_config(config).to(dtype)
    model.save_pretrained(folder, max_shard_size="500MB")
    write_tokenizer(folder)
    return folder


def anonymous(process: psutil.Process) -> int:
    """Bytes that are not of a file; mapped weights give way when memory is short."""
    try:
        lines = Path("/proc", str(process.pid), "status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


@contextmanager
def watching() -> Iterator[dict[int, int]]:
    """The most that each rank held at once."""
    most: dict[int, int] = {}
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            ranks = own_ranks()  # takes longer than to read what they hold
            for _ in range(20):
                for rank in ranks:
                    most[rank.pid] = max(most.get(rank.pid, 0), anonymous(rank))
                time.sleep(0.02)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield most
    finally:
        done.set()
        thread.join()


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read from /proc")
@pytest.mark.parametrize(
    ("dtype", "ranks", "peak", "settled"),
    [
        (torch.float32, 2, 0.58, 0.6),
        (torch.bfloat16, 2, 0.95, 0.6),
        (torch.bfloat16, 1, 1.2, 1.1),
    ],
)
async def test_a_rank_never_holds_much_more_than_its_share(
    dtype: torch.dtype, ranks: int, peak: float, settled: float, tmp_path: Path
) -> None:
    """`peak` and `settled` are parts of the weights' size. In bfloat16 the embedding is cast, and a
    layer while it computes."""
    engine = "deepspeed" if ranks > 1 else "accelerate"
    options: dict[str, Any] = {"engine": engine, "max_kv_tokens": 1024}
    if ranks > 1:
        options["tensor_parallel"] = ranks
    async with serving(write_model("llama", tmp_path / "small"), **options):
        libraries = max(anonymous(rank) for rank in own_ranks())
    folder = write_large(tmp_path / "large", dtype)
    whole = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert whole > 0.5e9 * dtype.itemsize
    with watching() as most:
        async with serving(folder, patience=250, **options) as runner:
            await collect(runner, "hello there", max_new_tokens=4, ignore_eos=True)
            steady = [anonymous(rank) - libraries for rank in own_ranks()]
    assert len(most) == len(steady) == ranks
    assert max(most.values()) - libraries < peak * whole
    assert max(steady) < settled * whole
