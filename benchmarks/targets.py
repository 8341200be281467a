"""Absent devices for which JAX can compile, such as `tpu:v5e:2x2` and `gpu:h100`.

A TPU is named by its generation and the shape of its slice, and needs the compiler of the extra
`aot-tpu`. A GPU is described by a file in `benchmarks/devices/`, in the form of XLA's
`GpuTargetConfigProto`, and needs the extra `aot-gpu`. No device is opened.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from benchmarks.environment import version
from benchmarks.results import ResultError
from benchmarks.traffic import Chip

DESCRIPTIONS = Path(__file__).with_name("devices")
# By `device_kind`: bytes per second of the main memory, and operations per second in bfloat16, of
# one JAX device, which is half a chip for TPU v4 and TPU7x. A TPU computes a float32 product in one
# pass of bfloat16, or in six if the highest precision is requested; an NVIDIA GPU computes it in
# TF32, or in its float32 units.
CHIPS = {
    "TPU v4": Chip(614e9, 137e12, 1, 6),
    "TPU v5 lite": Chip(819e9, 197e12, 1, 6),
    "TPU v5": Chip(2765e9, 459e12, 1, 6),
    "TPU v6 lite": Chip(1640e9, 918e12, 1, 6),
    "TPU7x": Chip(3690e9, 1153e12, 1, 6),
    "NVIDIA H100 80GB HBM3": Chip(3352e9, 989e12, 2, 15),
}
# The package by which an extra is detected.
EXTRAS = {"tpu": ("aot-tpu", "libtpu"), "gpu": ("aot-gpu", "jax-cuda12-pjrt")}
# Values that libtpu would request from the metadata of a virtual machine, and a setting that lets
# it load beside another process.
TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
}
# Without a device XLA cannot tune, and finds no tiles for some products in Triton.
GPU_FLAGS = "--xla_gpu_enable_triton_gemm=false"
GPUS_OF_A_MESH = "1x1x8"


class UnknownTarget(ResultError):
    """A target that cannot be compiled here; the message names what is missing."""


@dataclass(frozen=True)
class Target:
    """The devices of a target: `name` as it was given, `platform` is "tpu" or "gpu"."""

    name: str
    platform: str
    devices: list[Any]

    @property
    def kind(self) -> str:
        """The name that the device gives itself."""
        return self.devices[0].device_kind

    @property
    def chip(self) -> Chip:
        """The limits of one device."""
        return CHIPS[self.kind]

    @property
    def compiler(self) -> str:
        """The package that compiles, with its version; the figures depend on both."""
        package = EXTRAS[self.platform][1]
        return f"{package} {version(package)}"


def prepare(name: str) -> None:
    """Sets environment variables that the compilers read; call it before JAX starts a backend."""
    platform = name.partition(":")[0]
    if platform == "tpu":
        for key, value in TPU_ENVIRONMENT.items():
            os.environ.setdefault(key, value)
    if platform == "gpu" and GPU_FLAGS not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {GPU_FLAGS}".strip()
    jax.config.update("jax_platforms", "cpu")


def target(name: str) -> Target:
    """The devices of a target.

    Raises:
        UnknownTarget: the target is unknown, or its extra is not installed.
    """
    from jax.experimental import topologies

    platform, _, rest = name.partition(":")
    if platform not in EXTRAS or not rest:
        raise UnknownTarget(f"a target is tpu:GENERATION:SHAPE or gpu:NAME, got {name!r}")
    extra, package = EXTRAS[platform]
    if version(package) is None:
        raise UnknownTarget(f"{name} needs the extra {extra}: pip install '.[{extra}]'")
    prepare(name)
    try:
        if platform == "tpu":
            found = topologies.get_topology_desc(platform="tpu", topology_name=rest)
        else:
            found = _gpus(*rest.split(":", 1))
    except (RuntimeError, ValueError, NotImplementedError) as error:
        text = str(error).splitlines()[0]
        raise UnknownTarget(f"{name} cannot be compiled for: {text}") from error
    result = Target(name, platform, list(found.devices))
    if result.kind not in CHIPS:
        raise UnknownTarget(f"{name}: the bandwidth of a {result.kind} is not in CHIPS")
    return result


def mesh_devices(target: Target) -> list[Any]:
    """The devices for programs over a mesh: the slice, or for a GPU a machine of eight."""
    if target.platform == "tpu" or len(target.devices) > 1:
        return target.devices
    return list(_gpus(target.name.split(":")[1], GPUS_OF_A_MESH).devices)


def _gpus(name: str, shape: str = "1x1x1") -> Any:
    from jax.experimental import topologies

    file = DESCRIPTIONS / f"{name}.txtpb"
    if not file.exists():
        known = ", ".join(sorted(f"gpu:{path.stem}" for path in DESCRIPTIONS.glob("*.txtpb")))
        raise UnknownTarget(f"there is no description of gpu:{name}; there is {known}")
    return topologies.get_topology_desc(
        platform="cuda", topology_name=name, target_config=file.read_text(), topology=shape
    )
