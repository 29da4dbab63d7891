"""Where a result came from: versions, machine, command line, git state."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from secateur._version import __version__

__all__ = ["PACKAGES", "provenance"]

PACKAGES = (
    "torch",
    "torchvision",
    "numpy",
    "scipy",
    "scikit-learn",
    "safetensors",
    "lightning-fabric",
    "torch-pruning",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "timm",
)


def provenance(device: str, threads: int) -> dict[str, Any]:
    """Everything needed to tell two results apart; plain JSON."""
    return {
        "versions": {"secateur": __version__, **{n: v for n in PACKAGES if (v := installed(n)) is not None}},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device,
        "threads": threads,
        # Under `python -m` the name is that of a file in the package.
        "command": [Path(sys.argv[0]).name.replace("__main__.py", "secateur"), *sys.argv[1:]],
        "git": git_state(Path.cwd()),
    }


def installed(package: str) -> str | None:
    """Version of an installed package, None if it is not there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit and whether files differ from it; None outside a git repository."""
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return {"commit": commit, "dirty": bool(_git(folder, "status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=10
    )
    return done.stdout.strip()
