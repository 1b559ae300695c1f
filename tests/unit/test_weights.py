"""What the header of a safetensors file says: names, dtypes and numbers of parameters."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from runners.contracts.errors import IncompleteModel
from runners.hf.dtypes import dtype_in
from runners.hf.weights import StoredTensor, count_parameters, main_dtype, read_header


def test_parameters_by_dtype(tmp_path: Path) -> None:
    tensors = {
        "a": torch.zeros(3, 5, dtype=torch.bfloat16),
        "b": torch.zeros(4, dtype=torch.int64),
        "empty": torch.zeros(0, 7),
        "scalar": torch.tensor(1.0),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    header = read_header(tmp_path / "x.safetensors")
    assert header.tensors["a"] == StoredTensor("BF16", 15)
    assert header.parameters == {"BF16": 15, "I64": 4, "F32": 1}
    total = count_parameters([header, header])
    assert (total.total(), main_dtype(total)) == (40, "bfloat16")
    assert main_dtype(count_parameters([])) == "none"
    assert dtype_in(tmp_path / "x.safetensors") is torch.bfloat16


def test_only_floating_tensors_have_a_dtype_to_compute_in(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(4, dtype=torch.int64)}, tmp_path / "x.safetensors")
    assert dtype_in(tmp_path / "x.safetensors") is None


def test_the_error_names_the_file_as_the_caller_does(tmp_path: Path) -> None:
    header = json.dumps({"x": {"dtype": "U8", "shape": [9], "data_offsets": [0, 9]}}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(IncompleteModel, match=r"^x\.safetensors is not a complete safetensors"):
        read_header(path)
    with pytest.raises(IncompleteModel, match=r"^demo/x is not a complete safetensors file: "):
        read_header(path, "demo/x")
