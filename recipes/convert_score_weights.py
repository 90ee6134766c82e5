"""Convert the published weights of score models, which are pickles, to safetensors, once.

    python recipes/convert_score_weights.py sac+logos+ava1-l14-linearMSE.pth aesthetic.safetensors
    python recipes/convert_score_weights.py HPS_v2.1_compressed.pt hps.safetensors
    python recipes/convert_score_weights.py MPS_overall_checkpoint.pth mps.safetensors

In: a file of torch.save. Out: its tensors under their own names; of a training checkpoint, those of the model. The surprising thing: it
runs no code from the file. torch's own restricted reader takes tensors and plain values; MPS is published as a whole module, whose classes
are taken for empty ones here, so that only the parameters inside them are found.
"""

from __future__ import annotations

import argparse
import pickle  # noqa: TID251 - the published file of MPS is a pickle of modules; ModuleUnpickler below builds tensors and empty shells alone
import sys
import types
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from openemu3.records import InputError


def main() -> int:
    parser = argparse.ArgumentParser(description="Convert published score models from pickles to safetensors.")
    parser.add_argument("source", type=Path, help="the .pt or .pth file as published")
    parser.add_argument("target", type=Path, help="the .safetensors file to write")
    arguments = parser.parse_args()
    try:
        count = convert(arguments.source, arguments.target)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{arguments.target}: {count} tensors")
    return 0


def convert(source: Path, target: Path) -> int:
    """Writes the tensors of `source` to `target`; returns how many. Raises InputError for a file without tensors, or with other objects."""
    if not source.is_file():
        raise InputError(f"{str(source)!r} is not there; fetch it first")
    shells = types.SimpleNamespace(
        Unpickler=ModuleUnpickler, load=lambda file, **_: ModuleUnpickler(file).load(), __name__="shells", HIGHEST_PROTOCOL=2
    )
    try:
        loaded = torch.load(source, map_location="cpu", weights_only=True)  # noqa: TID251 - the restricted reader, in a one-off conversion
    except pickle.UnpicklingError:
        try:
            loaded = torch.load(source, map_location="cpu", weights_only=False, pickle_module=shells)  # noqa: TID251 - see ModuleUnpickler
        except pickle.UnpicklingError as error:
            raise InputError(f"{str(source)!r} holds other objects than tensors and modules: {error}") from error
    tensors = find_tensors(loaded)
    if not tensors:
        raise InputError(f"{str(source)!r} holds no tensors under names")
    save_file(tensors, target)
    return len(tensors)


class _Shell:
    """Stands for a module of any class: keeps its state, does nothing."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


class ModuleUnpickler(pickle.Unpickler):
    """Builds tensors, ordered dicts and shells; every other class is a shell, so that nothing of the file runs."""

    ALLOWED = {
        ("collections", "OrderedDict"): OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
        ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
        ("torch", "Size"): torch.Size,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.ALLOWED:
            return self.ALLOWED[(module, name)]
        if module == "torch" and name.endswith("Storage"):
            return getattr(torch, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        return _Shell


def find_tensors(loaded: Any) -> dict[str, torch.Tensor]:
    """Tensors by their names: of a state dict, of a checkpoint's state dict, or of a module's parameters and buffers."""
    if isinstance(loaded, dict):
        inner = loaded.get("state_dict", loaded)
        return {str(name): value.contiguous().clone() for name, value in inner.items() if isinstance(value, torch.Tensor)}
    found: dict[str, torch.Tensor] = {}

    def visit(module: Any, prefix: str) -> None:
        state = getattr(module, "__dict__", {})
        for kind in ("_parameters", "_buffers"):
            for name, value in (state.get(kind) or {}).items():
                if isinstance(value, torch.Tensor):
                    found[prefix + name] = value.detach().contiguous().clone()
        for name, child in (state.get("_modules") or {}).items():
            visit(child, f"{prefix}{name}.")

    visit(loaded, "")
    return found


if __name__ == "__main__":
    sys.exit(main())
