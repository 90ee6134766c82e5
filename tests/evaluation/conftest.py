"""The published networks that numbers are measured with, fetched once into the ignored .cache/ folder."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def measuring_weights() -> Path:
    """The folder with lpips_vgg.safetensors, lpips_alex.safetensors and fid_inception.pt."""
    folder = ROOT / ".cache" / "weights"
    subprocess.run([sys.executable, str(ROOT / "recipes" / "fetch_weights.py"), "--cache", str(folder)], check=True, capture_output=True)
    return folder


@pytest.fixture
def measuring_cache(measuring_weights: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, found as a user's program finds it."""
    monkeypatch.setenv("OPENEMU3_CACHE", str(measuring_weights))
    return measuring_weights
