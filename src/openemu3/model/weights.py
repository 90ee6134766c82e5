"""Weights on disk: folders of safetensors and a config.json, read in every published layout and written in ours.

In: a folder. Out: `ModelConfig`, tensors one by one under published names, or a module filled with them.
Memory is that of one copy: modules lie on the meta device and take over tensor after tensor, each cast as it is read.
Whatever is wrong with a folder is told in one InputError, before memory is taken where possible. Pickles are never opened.
The surprising thing: a file is opened again for every 32 MiB read, because pages of an open file count as memory of the process.

A folder holds `model.safetensors` (the transformer; in transformers' layout both parts) and, in our layout,
`vision_tokenizer.safetensors`; either may be split into `*-00001-of-0000N.safetensors` with a `*.safetensors.index.json`.
"""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from openemu3.model.layouts import (
    ModelConfig,
    Part,
    format_config,
    format_transformers_config,
    parse_config,
    to_published_name,
    to_published_shape,
    to_transformers,
)
from openemu3.model.transformer import Transformer
from openemu3.records import InputError

MAX_JSON_BYTES = 64 * 2**20  # transformers' config.json with its vocabulary is 6.6 MB
MAX_MAPPED_BYTES = 32 * 2**20
FILE_STEMS: dict[Part, tuple[str, ...]] = {"transformer": ("model",), "vision_tokenizer": ("vision_tokenizer", "model")}


# ---- reading


def read_config(folder: Path | str) -> ModelConfig:
    """The folder's config.json, in any of the layouts of `layouts.py`."""
    folder = _check_folder(folder)
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder} has no config.json; a model folder holds one beside its *.safetensors")
    try:
        return parse_config(_read_json(path))
    except InputError as error:
        raise InputError(f"{path} cannot be used: {error}") from error


def load_transformer(folder: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16) -> Transformer:
    """The folder's language model, in evaluation mode, its parameters of `dtype` on `device`."""
    config = read_config(folder).transformer
    if config is None:
        raise InputError(f"{folder} holds a vision tokenizer without a language model")
    stored = _list_tensors(Path(folder), "transformer")
    num_stored = len({name.split(".")[2] for name in stored if name.startswith("model.layers.")})
    if num_stored != config.num_layers:  # before a broken config builds a million layers
        raise InputError(f"{folder} has weights of {num_stored} layers; its config.json says {config.num_layers}")
    transformer = Transformer(config)
    _fill(transformer, Path(folder), "transformer", stored, device, dtype)
    return transformer.eval()


def load_into(
    module: nn.Module, folder: Path | str, part: Part, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> None:
    """Fill `module`, whose state has published names, with the folder's `part`; its floats become `dtype` (None: as stored).

    The module may lie on the meta device. Strict: every tensor must be there, none may be left over, all shapes must agree.
    That is checked on the files' headers, so that after an InputError the module is as it was.
    """
    folder = _check_folder(folder)
    _fill(module, folder, part, _list_tensors(folder, part), device, dtype)


def load_state(folder: Path | str, part: Part) -> Iterator[tuple[str, Tensor]]:
    """The folder's tensors of one part, one by one: published name and CPU tensor, shaped as published, of the stored dtype."""
    folder = _check_folder(folder)
    # Copies, since what is read is a window on the file.
    return ((name, window.clone()) for name, window in _read_tensors(_list_tensors(folder, part)))


def open_state(folder: Path | str, part: Part) -> Mapping[str, Tensor]:
    """The same by name, each tensor read when it is asked for: a window on the file, to be copied by whoever keeps it."""
    return _OpenState(_list_tensors(_check_folder(folder), part))


class _OpenState(Mapping[str, Tensor]):
    def __init__(self, stored: Mapping[str, "_Stored"]) -> None:
        self._stored = stored

    def __getitem__(self, name: str) -> Tensor:
        return next(window for _, window in _read_tensors({name: self._stored[name]}))

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


class _Stored(NamedTuple):
    """Where a tensor lies."""

    path: Path
    key: str  # its name in the file
    shape: tuple[int, ...]  # as published
    num_bytes: int
    is_float: bool


def _fill(
    module: nn.Module,
    folder: Path,
    part: Part,
    stored: Mapping[str, _Stored],
    device: torch.device | str,
    dtype: torch.dtype | None,
) -> None:
    expected = module.state_dict()
    _check_match(folder, part, expected, stored)
    for name, window in _read_tensors(stored):
        owner_name, _, attribute = name.rpartition(".")
        owner = module.get_submodule(owner_name)
        old = expected.pop(name)
        cast = window.to(device=device, dtype=dtype if window.is_floating_point() else old.dtype, copy=True)
        if attribute in owner._parameters:
            requires_grad = owner._parameters[attribute].requires_grad  # type: ignore[union-attr]
            setattr(owner, attribute, nn.Parameter(cast, requires_grad=requires_grad))
        else:
            setattr(owner, attribute, cast)


def _check_match(folder: Path, part: Part, expected: Mapping[str, Tensor], stored: Mapping[str, _Stored]) -> None:
    what = part.replace("_", " ")
    missing = [name for name in expected if name not in stored]
    unexpected = [name for name in stored if name not in expected]
    if missing or unexpected:
        sides = [f"lacks {_list_some(missing)}"] if missing else []
        sides += [f"has {_list_some(unexpected)} that do not belong to it"] if unexpected else []
        raise InputError(f"{folder} is not this {what}: it {' and '.join(sides)}")
    for name, tensor in expected.items():
        if tuple(tensor.shape) != stored[name].shape:
            found, needed = list(stored[name].shape), list(tensor.shape)
            raise InputError(f"{stored[name].path} holds {name} of shape {found}; by its config.json {needed} is needed")
        if tensor.is_floating_point() and not stored[name].is_float:
            raise InputError(f"{stored[name].path} holds {name} as whole numbers; only floating-point weights are supported")


def _list_tensors(folder: Path, part: Part) -> dict[str, _Stored]:
    """The part's tensors by published name, from the files' headers alone."""
    stored: dict[str, _Stored] = {}
    for path in _find_files(folder, part):
        with _open(path) as file:
            for key in file.keys():
                header = file.get_slice(key)
                kind = header.get_dtype()
                belongs, name = to_published_name(key) or (part, key)  # a name of no layout is reported as unexpected
                if belongs != part:
                    continue
                if name in stored:
                    raise InputError(f"{path} holds {key}, which {stored[name].path.name} holds too, as {stored[name].key}")
                shape = to_published_shape(name, header.get_shape())
                size = torch.Size(shape).numel() * int("".join(filter(str.isdigit, kind.split("_")[0])) or 8) // 8
                stored[name] = _Stored(path, key, shape, size, kind.startswith(("F", "BF")))
    if not stored:
        raise InputError(f"{folder} holds no weights of a {part.replace('_', ' ')}")
    return stored


def _find_files(folder: Path, part: Part) -> list[Path]:
    """The safetensors files in which the part may be."""
    for stem in FILE_STEMS[part]:
        single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
        if single.exists():
            return [single]
        if index.exists():
            return _read_index(index)
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(pattern))
    if pickled:
        raise InputError(f"{folder} holds its weights as a pickle ({pickled[0]}), which is never opened; convert them to safetensors")
    needed = " or ".join(f"{stem}.safetensors" for stem in FILE_STEMS[part])
    raise InputError(f"{folder} holds no weights; {needed} is needed, whole or in shards with an index")


def _read_index(path: Path) -> list[Path]:
    """The shards that an index names. It comes from outside: names may not lead out of its folder."""
    index = _read_json(path)
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not names:
        raise InputError(f"{path} is no index of safetensors shards; it needs a weight_map of tensor names to file names")
    shards = []
    for name in dict.fromkeys(map(str, names.values())):
        if name != Path(name).name or "\\" in name or not name.endswith(".safetensors"):
            raise InputError(f"{path} names a shard {name!r}; a *.safetensors file of the same folder is allowed")
        shard = path.parent / name
        if not shard.is_file():
            raise InputError(f"{path} names a shard {name}, which is missing")
        shards.append(shard)
    return shards


def _read_tensors(stored: Mapping[str, _Stored]) -> Iterator[tuple[str, Tensor]]:
    """The tensors in the order of their files, as windows on them: copy what is to stay, or the file stays mapped.

    Never more than `MAX_MAPPED_BYTES`, or one tensor, of a file is mapped at a time.
    """
    names = sorted(stored, key=lambda name: (stored[name].path, stored[name].key))
    while names:
        path, budget = stored[names[0]].path, MAX_MAPPED_BYTES
        num_names = 0
        for name in names:
            budget -= stored[name].num_bytes
            if stored[name].path != path or (budget < 0 and num_names):
                break
            num_names += 1
        chosen, names = names[:num_names], names[num_names:]
        with _open(path) as file:
            for name in chosen:
                try:
                    window = file.get_tensor(stored[name].key).reshape(stored[name].shape)
                except (SafetensorError, OSError) as error:
                    raise InputError(f"{path} cannot be read at {stored[name].key}: {error}") from error
                yield name, window


@contextlib.contextmanager
def _open(path: Path) -> Iterator[safe_open]:
    try:
        file = safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size if path.exists() else 0
        raise InputError(f"{path} ({size:,} bytes) is not a whole safetensors file: {error}") from error
    with file as opened:
        yield opened


def _read_json(path: Path) -> object:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise InputError(f"{path} has {path.stat().st_size:,} bytes; at most {MAX_JSON_BYTES:,} are allowed")
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is not readable JSON: {error}") from error


def _check_folder(folder: Path | str) -> Path:
    folder = Path(folder)
    if not folder.is_dir():
        state = "is not a folder" if folder.exists() else "does not exist"
        raise InputError(f"{folder} {state}; a model folder is needed")
    return folder


def _list_some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


# ---- writing


def save_config(folder: Path | str, config: ModelConfig) -> None:
    """Write config.json in our layout; the folder is made if need be."""
    text = json.dumps(format_config(config), indent=2) + "\n"
    with _write_aside(Path(folder)) as aside:
        (aside / "config.json").write_text(text, encoding="utf-8")
        _move(aside, Path(folder), ["config.json"])


def save_transformer(folder: Path | str, transformer: Transformer, dtype: torch.dtype | None = torch.bfloat16) -> None:
    """Write the language model's tensors; its config goes into `save_config`."""
    save_state(folder, transformer.state_dict(), "model", dtype)


def convert_to_transformers(source: Path | str, folder: Path | str, text_only: bool = False) -> None:
    """Write a model folder once more in transformers' layout: both parts as one `Emu3ForConditionalGeneration`, or the language model
    alone as an `Emu3ForCausalLM`. Numbers stay as they are; config.json comes last. Text tokenizers have no place in it."""
    try:
        raw = format_transformers_config(read_config(source), text_only)
    except InputError as error:
        raise InputError(f"{source} cannot be written in transformers' layout: {error}") from error
    state = dict(open_state(source, "transformer"))
    if not text_only:
        state = to_transformers("transformer", state) | to_transformers("vision_tokenizer", dict(open_state(source, "vision_tokenizer")))
    save_state(folder, state, "model")
    with _write_aside(Path(folder)) as aside:
        (aside / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
        _move(aside, Path(folder), ["config.json"])


def save_state(
    folder: Path | str,
    state: Mapping[str, Tensor],
    stem: str,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write tensors as `{stem}.safetensors`, or as shards with an index if they exceed `max_shard_bytes`.

    stem: "model" or "vision_tokenizer". dtype: what floats are cast to (None: as they are).
    All files are written aside and then moved into place, so that a full disk leaves what was there before; InputError then.
    Memory beside the state: one shard, and only if it has to be cast or brought from another device.
    """
    folder = Path(folder)
    shards: list[list[str]] = [[]]
    shard_bytes = total_bytes = 0
    for name, tensor in state.items():
        cast_to = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        num_bytes = tensor.numel() * cast_to.itemsize
        if shards[-1] and shard_bytes + num_bytes > max_shard_bytes:
            shards.append([])
            shard_bytes = 0
        shards[-1].append(name)
        shard_bytes += num_bytes
        total_bytes += num_bytes
    single, index = f"{stem}.safetensors", f"{stem}.safetensors.index.json"
    names = [single] if len(shards) == 1 else [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    with _write_aside(folder) as aside:
        for file_name, tensor_names in zip(names, shards, strict=True):
            tensors = {name: state[name].detach() for name in tensor_names}
            tensors = {name: t.to("cpu", dtype if t.is_floating_point() else None).contiguous() for name, t in tensors.items()}
            save_file(tensors, aside / file_name, metadata={"format": "pt"})
        outdated = {path.name for path in folder.glob(f"{stem}-*-of-*.safetensors")} - set(names)
        if len(shards) > 1:
            weight_map = {name: file_name for file_name, shard in zip(names, shards, strict=True) for name in shard}
            (aside / index).write_text(json.dumps({"metadata": {"total_size": total_bytes}, "weight_map": weight_map}, indent=2))
            # Interrupted from here on, the folder is without an index: incomplete, but never a mixture that loads.
            (folder / index).unlink(missing_ok=True)
            (folder / single).unlink(missing_ok=True)
            names.append(index)
        else:
            outdated.add(index)
        _move(aside, folder, names)
        for name in outdated:
            (folder / name).unlink(missing_ok=True)


@contextlib.contextmanager
def _write_aside(folder: Path) -> Iterator[Path]:
    """A temporary folder on the same file system, gone afterwards; trouble in writing becomes an InputError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder) as aside:
            yield Path(aside)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder} cannot be written: {error}") from error


def _move(aside: Path, folder: Path, names: Sequence[str]) -> None:
    for name in names:
        with open(aside / name, "rb") as file:
            os.fsync(file.fileno())
    for name in names:
        os.replace(aside / name, folder / name)
