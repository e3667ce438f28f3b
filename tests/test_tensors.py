"""Files of tensors: no bit of one may change unseen."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from deepdelta import UserError
from deepdelta.tensors import check_finite, load_tensors, save_tensors

TENSORS = {
    "matrix": torch.arange(6.0).reshape(2, 3).T,
    "scalar": torch.tensor(2.5),
    "none": torch.zeros(0, 3),
    "short": torch.tensor([1.0, -2.0], dtype=torch.bfloat16),
    "flags": torch.tensor([True, False, True]),
    "müon": torch.arange(3),
}


def test_what_is_written_is_read_by_us_and_by_the_library(tmp_path: Path) -> None:
    file = tmp_path / "new" / "a.safetensors"
    save_tensors(file, TENSORS, {"step": "3"})
    tensors, metadata = load_tensors(file, "mend it")
    assert metadata == {"step": "3"}
    for found in (tensors, load_file(file)):
        assert found.keys() == TENSORS.keys()
        assert all(
            tensor.equal(TENSORS[name]) and tensor.dtype == TENSORS[name].dtype for name, tensor in found.items()
        )
    save_tensors(file, {})
    assert load_tensors(file, "mend it") == ({}, {})


def test_no_byte_changes_unseen(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_tensors(file, TENSORS, {"step": "3", "seconds": "0.5"})
    whole = file.read_bytes()
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1 << place % 8
        file.write_bytes(changed)
        with pytest.raises(UserError, match=r"a\.safetensors .*(damaged|checksum).*; mend it\.$"):
            load_tensors(file, "mend it")
    file.write_bytes(whole)
    load_tensors(file, "mend it")


@pytest.mark.parametrize("what", ["names", "dtype", "shape", "step", "less", "more"])
def test_a_well_formed_file_that_says_something_else(tmp_path: Path, what: str) -> None:
    """The checksum of one file in another that differs from it in a single respect."""
    file = tmp_path / "a.safetensors"
    given = {"a": torch.tensor([1, 2]), "b": torch.tensor([3, 4])}
    save_tensors(file, given, {"step": "3"})
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    other = {
        "names": {"a": given["b"], "b": given["a"]},
        "dtype": given | {"a": given["a"].view(torch.float64)},
        "shape": given | {"a": given["a"][:, None]},
        "step": given,
        "less": {"a": given["a"]},
        "more": given | {"c": torch.zeros(0)},
    }[what]
    save_file(given, file, metadata)
    load_tensors(file, "mend it")
    save_file(other, file, metadata | {"step": "4"} if what == "step" else metadata)
    with pytest.raises(UserError, match="does not have the checksum it was written with; mend it"):
        load_tensors(file, "mend it")


def test_files_of_others(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(2)}, file)
    with pytest.raises(UserError, match="holds no checksum: it is damaged, or nothing that this version wrote; mend"):
        load_tensors(file, "mend it")
    for content in (b"", b"{}", json.dumps({"a": 1}).encode(), b"\xff" * 100):
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"a\.safetensors is truncated or damaged"):
            load_tensors(file, "mend it")
    with pytest.raises(UserError, match=r"b\.safetensors cannot be read: No such file or directory. Mend it"):
        load_tensors(tmp_path / "b.safetensors", "mend it")
    with pytest.raises(UserError, match=r"cannot be read|damaged"):
        load_tensors(tmp_path, "mend it")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_named(value: float) -> None:
    weights = {"a": torch.zeros(2), "n": torch.arange(2), "b": torch.tensor([0.0, value]), "c": torch.tensor(value)}
    with pytest.raises(UserError, match=r"^here must hold finite weights, but 'b' holds NaN or infinity"):
        check_finite(weights, "here")
    check_finite({name: weights[name] for name in ("a", "n")}, "here")
