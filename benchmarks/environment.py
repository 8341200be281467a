"""The environment of a run: the device, the versions and the settings of its figures."""

import datetime
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

ROOT = Path(__file__).parents[1]
PACKAGES = ("softjax-regression", "jax", "jaxlib", "optax", "numpy", "scipy", "scikit-learn")


def environment() -> dict[str, Any]:
    """The first line of a result file."""
    device = jax.devices()[0]
    return {
        "record": "environment",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "clean": _git("status", "--porcelain") == "",
        "platform": device.platform,
        "device": device.device_kind,
        "devices": jax.device_count(),
        "driver": device.client.platform_version,
        "processor": _processor(),
        "cores": _cores(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
        "flags": {k: v for k, v in os.environ.items() if k.startswith(("JAX_", "XLA_"))},
    }


def version(distribution: str) -> str | None:
    """The installed version of a package; None if it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """The output of git in this checkout; None outside of a checkout."""
    try:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, check=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _processor() -> str:
    """The model of the processor, which only Linux provides in a file."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.split(": ", 1)[1] for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def _cores() -> int | None:
    """The number of cores that this process may use, possibly fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()
