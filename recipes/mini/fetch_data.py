"""Fetch the npm packages that the mini model's pictures, clips and names come from.

    python recipes/mini/fetch_data.py [--folder FOLDER] [--only stills]

In: the npm registry, through the npm client. Out: tarballs in a folder, pinned by version and SHA-256; those already there and whole
are left alone, and a damaged one is fetched again. 46 MB of still pictures and names, 730 MB of animations.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

from openemu3.records import InputError

REPOSITORY = Path(__file__).resolve().parents[2]
NPM_TIMEOUT = 1800  # seconds for one package


@dataclass(frozen=True)
class Package:
    """One published npm tarball: its specifier, file name, size in bytes and SHA-256."""

    name: str
    version: str
    size: int
    sha256: str

    @property
    def file_name(self) -> str:
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


STILLS = (
    Package("emojibase-data", "17.0.0", 6_711_091, "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a"),
    Package("fluentui-emoji", "1.3.0", 23_804_319, "ec892e607e854859b812c7d827801756adc19955b0ef56d4ae8afcddd19492c5"),
    Package("@lobehub/fluent-emoji-3d", "1.1.0", 15_792_027, "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58"),
)
ANIMATIONS = (
    Package("@lobehub/fluent-emoji-anim-1", "1.0.0", 164_966_217, "4c03ac178c1eabf2e2a16dd498f3cc2b92dc30ec3466ae38fdc497d4774c99ea"),
    Package("@lobehub/fluent-emoji-anim-2", "1.0.0", 181_915_962, "e431da8172e394036c330faa77648d6fbbae1fd3b0be95637c4497c9075019c0"),
    Package("@lobehub/fluent-emoji-anim-3", "1.0.0", 197_000_910, "3624d0c34c819c1794b74ccf6ae9034adff7c4cb6318dd2a645145f0196feb43"),
    Package("@lobehub/fluent-emoji-anim-4", "1.0.0", 185_915_894, "3d4c08f1e321f70808ef4996aba0ab575a9d97b6c56ffffc92cf6161a7836aa3"),
)


@dataclass(frozen=True)
class Fetching:
    """Fetch the emoji packages.

    Args:
        folder: where the tarballs go.
        only: "stills" for the pictures and names without the animations, "animations" for those alone; both by default.
    """

    folder: Path = REPOSITORY / ".cache" / "npm"
    only: Literal["stills", "animations"] | None = None


def fetch_packages(packages: tuple[Package, ...], folder: Path) -> list[Path]:
    """Bring the packages into the folder and return their paths, in order.

    Raises InputError if npm is not installed or fails, or if what it brings is not what was published.
    """
    folder = folder.resolve()  # npm runs in a folder of its own
    folder.mkdir(parents=True, exist_ok=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("packages", total=sum(package.size for package in packages))
        for package in packages:
            progress.update(task, description=f"{package.name}@{package.version}")
            if not is_whole(folder / package.file_name, package):
                _run_npm_pack(package, folder)
            progress.advance(task, package.size)
        progress.update(task, description=f"{len(packages)} packages")
    return [folder / package.file_name for package in packages]


def is_whole(path: Path, package: Package) -> bool:
    """Whether the file is there with the package's size and SHA-256."""
    if not path.is_file() or path.stat().st_size != package.size:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == package.sha256


def _run_npm_pack(package: Package, folder: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise InputError(f"npm is not installed, and {package.name} comes from the npm registry; install Node.js with npm (Debian: npm)")
    with tempfile.TemporaryDirectory(prefix=".fetching-", dir=folder) as scratch:
        # npm keeps a second copy of whatever it fetches: in the scratch folder it goes away with it
        command = [npm, "pack", f"{package.name}@{package.version}", "--ignore-scripts", "--pack-destination", scratch]
        command += ["--cache", f"{scratch}/npm-cache", "--loglevel", "error"]
        try:
            run = subprocess.run(command, cwd=scratch, capture_output=True, text=True, timeout=NPM_TIMEOUT)
        except subprocess.TimeoutExpired as error:
            raise InputError(f"npm took more than {NPM_TIMEOUT} seconds for {package.name}@{package.version}; try again") from error
        if run.returncode != 0:
            reason = " ".join(run.stderr.split())[-300:]
            raise InputError(f"npm could not fetch {package.name}@{package.version} (exit code {run.returncode}): {reason}")
        fetched = Path(scratch) / package.file_name
        if not is_whole(fetched, package):
            raise InputError(f"{package.name}@{package.version} as fetched is not the published tarball with SHA-256 {package.sha256}")
        fetched.replace(folder / package.file_name)


def main(fetching: Fetching) -> None:
    packages = {"stills": STILLS, "animations": ANIMATIONS, None: STILLS + ANIMATIONS}[fetching.only]
    for path in fetch_packages(packages, fetching.folder):
        print(path)


if __name__ == "__main__":
    try:
        main(tyro.cli(Fetching))
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
