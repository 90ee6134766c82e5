"""Published pickles become safetensors, and nothing in them runs."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from openemu3.curation.clip_scores import build_aesthetic_head
from openemu3.records import InputError

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))
from convert_score_weights import convert


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = build_aesthetic_head(8)
        self.register_buffer("mean", torch.arange(3.0))
        self.scale = torch.nn.Parameter(torch.ones(2, 2, dtype=torch.float16))


@pytest.mark.parametrize("layout", ["state_dict", "checkpoint", "module"])
def test_tensors_keep_their_names_and_values(layout: str, tmp_path: Path) -> None:
    model = Model()
    state = model.state_dict()
    stored: Any = {"state_dict": state, "checkpoint": {"epoch": 3, "state_dict": state}, "module": model}[layout]
    torch.save(stored, tmp_path / "in.pth")
    assert convert(tmp_path / "in.pth", tmp_path / "out.safetensors") == len(state)
    read = load_file(tmp_path / "out.safetensors")
    assert read.keys() == state.keys()
    for name, value in state.items():
        assert read[name].dtype == value.dtype and torch.equal(read[name], value)


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch " + os.environ["BOMB"],)


def test_code_in_a_file_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOMB", str(tmp_path / "ran"))
    torch.save({"x": torch.ones(1), "bomb": Bomb()}, tmp_path / "in.pth")
    convert(tmp_path / "in.pth", tmp_path / "out.safetensors")
    assert load_file(tmp_path / "out.safetensors").keys() == {"x"} and not (tmp_path / "ran").exists()


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not there"):
        convert(tmp_path / "in.pth", tmp_path / "out.safetensors")
