"""What a compiled program sends between devices: its collectives, and their bytes on the wire.

A device of a group of n sends, by the ring algorithms, of an array of b bytes

    all-reduce            2 (n - 1) / n b
    all-gather            (n - 1) / n b      b of the result
    reduce-scatter        (n - 1) / n b      b of the operand, n times the result
    all-to-all            (n - 1) / n b
    collective-permute    b

A collective in a loop counts as often as the loop goes round; one of a single device, not at all.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s32": 4, "u32": 4}
BYTES |= {"f32": 4, "s64": 8, "u64": 8, "f64": 8}

OPERATION = re.compile(
    r"= (?P<type>.*?) "
    r"(?P<kind>all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?\("
)
ARRAY = re.compile(r"\b(\w+)\[([\d,]*)\]")
COMPUTATION = re.compile(r"^(ENTRY )?%?(\S+) \(.*\{$")
CALLED = re.compile(r"\b(?:body|condition|calls|to_apply|\w+_computation)=%?(\S+?)[,)\s]")
BRANCHES = re.compile(r"branch_computations=\{(.*?)\}")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
        kind: such as "all-reduce".
        arrays: (dtype, shape) of each array of the result, as ("f32", (512, 256)).
        devices: the devices of a group.
        times: how often it is run.
    """

    kind: str
    arrays: tuple[tuple[str, tuple[int, ...]], ...]
    devices: int
    times: int

    @property
    def elements(self) -> int:
        """The numbers of the result, each time."""
        return sum(math.prod(shape) for _, shape in self.arrays)

    @property
    def bytes(self) -> float:
        """The bytes that a device sends, all times together."""
        size = sum(BYTES[dtype] * math.prod(shape) for dtype, shape in self.arrays)
        n = self.devices
        factor = {
            "all-reduce": 2 * (n - 1) / n,
            "reduce-scatter": n - 1,
            "collective-permute": 1,
        }
        return self.times * size * factor.get(self.kind, (n - 1) / n)


def collectives(compiled: Any) -> list[Collective]:
    """Those of a compiled program, as from `jax.jit(f).lower(...).compile()`."""
    text = compiled.as_text()
    found = re.search(r"num_partitions=(\d+)", text)
    partitions = int(found.group(1)) if found else 1
    computations, entry = _computations(text)
    return list(_within(entry, computations, partitions, 1))


def wire_bytes(compiled: Any) -> float:
    """The bytes that a device sends in one run."""
    return sum(collective.bytes for collective in collectives(compiled))


def largest_array(compiled: Any) -> int:
    """The most elements of any array of the program, on one device."""
    shapes = (shape for _, shape in ARRAY.findall(compiled.as_text()))
    return max(math.prod(map(int, filter(None, shape.split(",")))) for shape in shapes)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of every computation by its name, and which is the entry."""
    lines: dict[str, list[str]] = {}
    name = entry = ""
    for line in text.splitlines():
        if head := COMPUTATION.match(line):
            name = head.group(2)
            lines[name] = []
            entry = name if head.group(1) else entry
        elif name:
            lines[name].append(line)
    return lines, entry


def _within(
    name: str, computations: dict[str, list[str]], partitions: int, times: int
) -> Iterator[Collective]:
    for line in computations[name]:
        if found := OPERATION.search(line):
            arrays = tuple(
                (dtype, tuple(int(n) for n in shape.split(",") if n))
                for dtype, shape in ARRAY.findall(found.group("type"))
            )
            if (devices := group(line, partitions)) > 1:
                yield Collective(found.group("kind"), arrays, devices, times)
            continue
        called = CALLED.findall(line)
        for branches in BRANCHES.findall(line):
            called += [branch.strip(" %") for branch in branches.split(",")]
        trips = TRIPS.search(line)
        for other in called:
            inside = list(_within(other, computations, partitions, 1))
            if inside and " while(" in line and trips is None:
                raise ValueError(f"wire: a collective in a loop of unknown length: {line.strip()}")
            more = int(trips.group(1)) if trips else 1
            yield from _within(other, computations, partitions, times * more)


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
