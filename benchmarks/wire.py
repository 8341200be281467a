"""The collectives of a compiled program, and the bytes that a device sends.

A device in a group of n sends, by the ring algorithms, for an array of b bytes

    all-reduce            2 (n - 1) / n b
    all-gather            (n - 1) / n b      b of the result
    reduce-scatter        (n - 1) / n b      b of the operand, n times the result
    all-to-all            (n - 1) / n b
    collective-permute    b

A collective in a loop counts as often as the loop runs; one on a single device does not count.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks import hlo

COLLECTIVE = re.compile(
    r"(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?"
)
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


@dataclass(frozen=True)
class Collective:
    """One collective of a program."""

    kind: str  # such as "all-reduce"
    arrays: tuple[hlo.Array, ...]  # the arrays of the result
    devices: int  # the number of devices in a group
    times: int  # how often it runs

    @property
    def elements(self) -> int:
        """The number of elements in the result of one run."""
        return sum(array.elements for array in self.arrays)

    @property
    def bytes(self) -> float:
        """The bytes that a device sends in all runs together."""
        size = sum(array.size for array in self.arrays)
        n = self.devices
        factor = {"all-reduce": 2 * (n - 1) / n, "reduce-scatter": n - 1, "collective-permute": 1}
        return self.times * size * factor.get(self.kind, (n - 1) / n)


def collectives(compiled: Any) -> list[Collective]:
    """The collectives of a compiled program, the result of `jax.jit(f).lower(...).compile()`."""
    program = hlo.read(compiled.as_text())
    return list(_within(program, program.entry, 1))


def wire_bytes(compiled: Any) -> float:
    """The bytes that a device sends in one run."""
    return sum(collective.bytes for collective in collectives(compiled))


def largest_array(compiled: Any) -> int:
    """The number of elements of the largest array in the program, on one device."""
    computations = hlo.read(compiled.as_text()).computations.values()
    every = (i.arrays for own in computations for i in own.instructions.values())
    return max(array.elements for arrays in every for array in arrays)


def _within(program: hlo.Program, name: str, times: int) -> Iterator[Collective]:
    for i in program.computations[name].instructions.values():
        if found := COLLECTIVE.fullmatch(i.operation):
            if (devices := group(i.attributes, program.partitions)) > 1:
                yield Collective(found[1], i.arrays, devices, times)
            continue
        trips = TRIPS.search(i.attributes)
        for other in i.computations:
            if other in program.computations:
                inside = list(_within(program, other, times * int(trips[1]) if trips else times))
                if inside and i.operation == "while" and trips is None:
                    raise ValueError(f"wire: a collective in a loop of unknown length: {i.name}")
                yield from inside


def group(line: str, partitions: int) -> int:
    """The devices of a group: `replica_groups` is a list, an iota or axes of a mesh."""
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return len(found.group(1).split(","))
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(found.group(1))
    if found := re.search(r"replica_groups=mesh\[(.*?)\][^{]*\{(.*?)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found.group(1)))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found.group(2))
        return math.prod(int(part or sizes[name]) for name, part in axes)
    return partitions
