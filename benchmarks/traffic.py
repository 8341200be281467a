"""The cost of a compiled program on its device, counted from its text without running it.

Each instruction that is launched separately, such as a fusion with all its parts, is a kernel. It
reads its operands from the main memory and writes its results there, with the padding of their
layouts. If it uses a slice of an operand, it reads only the slice; if it updates an array in place,
it writes only the update. A loop counts as often as it runs. The estimate of the time

    sum over the kernels of max(bytes / bandwidth, operations / peak)

contains neither latency nor launches. The inside of a custom kernel is not seen: it counts as
reading its operands and writing its results once. An array in the fast memory of a TPU costs
nothing.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from benchmarks import wire
from benchmarks.hlo import Array, Computation, Instruction, Program

# Operations for which no kernel is launched.
FREE = frozenset(
    (
        *("parameter", "constant", "iota", "tuple", "get-tuple-element", "bitcast", "domain"),
        *("partition-id", "replica-id", "after-all", "add-dependency", "opt-barrier"),
        "async-update",
    )
)
SLICES = ("dynamic-slice", "slice", "gather")
UPDATE = "dynamic-update-slice"
COLLECTIVE = re.compile(r"all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute")
# Smaller products count as sums, not as products.
SMALLEST_PRODUCT = 1e6


@dataclass(frozen=True)
class Chip:
    """The limits of a device: bytes per second, and operations per second in bfloat16.

    `slowed` gives the factors by which a product takes longer if its operands are float32, or if it
    requests the highest precision.
    """

    bandwidth: float
    peak: float
    slowed_float32: float
    slowed_highest: float


@dataclass(frozen=True)
class Kernel:
    """A launched instruction: how often it runs, the bytes that it reads and writes, its time."""

    name: str
    operation: str
    launches: int
    read: int
    written: int
    seconds: float


@dataclass
class Traffic:
    """The sums over a program: `products` by type, `collectives` in bytes that are sent.

    `asynchronous` is the part of these bytes that is sent while other kernels may run.
    """

    kernels: list[Kernel] = field(default_factory=list)
    products: Counter[str] = field(default_factory=Counter)
    collectives: Counter[str] = field(default_factory=Counter)
    asynchronous: Counter[str] = field(default_factory=Counter)
    flops: float = 0.0

    @property
    def bytes(self) -> int:
        """Bytes read and written in the main memory."""
        return sum(k.launches * (k.read + k.written) for k in self.kernels)

    @property
    def launches(self) -> int:
        """The number of kernel launches."""
        return sum(k.launches for k in self.kernels)

    @property
    def seconds(self) -> float:
        """The estimated time by the roofline model."""
        return sum(k.launches * k.seconds for k in self.kernels)


@dataclass(frozen=True)
class Product:
    """A matrix product, such as "bf16xbf16>f32", and its number of operations."""

    kind: str
    flops: float


def of_program(program: Program, chip: Chip) -> Traffic:
    """The traffic of a program on a device."""
    counting = _Counting(program, chip)
    counting.walk(program.computations[program.entry], 1)
    return counting.traffic


class _Counting:
    """A walk over a program that adds the costs of all instructions."""

    def __init__(self, program: Program, chip: Chip):
        self.program, self.chip, self.traffic = program, chip, Traffic()

    def walk(self, body: Computation, times: int) -> None:
        for i in body.instructions.values():
            if i.operation in FREE or i.operation.endswith("-done"):
                continue
            if i.operation == "while":
                self.walk(self.computation(i, "body"), times * self.trips(i))
            elif found := self.collective(i):
                operands = (body.instructions[o].arrays for o in i.operands)
                sent = round(times * self.sent(*found, operands))
                self.traffic.collectives[found[0]] += sent
                # A TPU puts the start and the end into neighbouring kernels, and leaves only a
                # name.
                if i.operation.endswith("-start") or "async_collective_name" in found[1].attributes:
                    self.traffic.asynchronous[found[0]] += sent
            elif i.operation in ("conditional", "call", "async-start"):
                for name in i.computations:
                    if name in self.program.computations:
                        self.walk(self.program.computations[name], times)
            else:
                self.kernel(i, body, times)

    def computation(self, i: Instruction, key: str) -> Computation:
        return self.program.computations[i.called(key) or ""]

    def trips(self, i: Instruction) -> int:
        """The number of iterations of a loop: known, or the bound of a counter that starts at 0."""
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', i.attributes)
        if known:
            return int(known[1])
        condition = self.computation(i, "condition").instructions.values()
        limits = [int(c.literal) for c in condition if c.operation == "constant"
                  and c.literal.isdigit()]  # fmt: skip
        return max(limits, default=1)

    def collective(self, i: Instruction) -> tuple[str, Instruction] | None:
        """The kind of a collective and its instruction, also if it is inside a wrapper.

        A TPU wraps asynchronous collectives, and has a reduce-scatter as a fusion of that name.
        """
        if found := COLLECTIVE.search(i.operation):
            return found[0], i
        if i.operation in ("async-start", "fusion"):
            name = i.called("calls") or ""
            for inner in self.program.computations[name].instructions.values():
                if found := COLLECTIVE.search(inner.operation):
                    return "reduce-scatter" if "all-reduce-scatter" in name else found[0], inner
        return None

    def sent(self, kind: str, i: Instruction, operands: Iterable[tuple[Array, ...]]) -> float:
        """The bytes that a device sends, by the ring algorithms of `benchmarks.wire`."""
        size = sum(a.size for arrays in operands for a in arrays)
        n = wire.group(i.attributes, self.program.partitions)
        factor = {"all-reduce": 2 * (n - 1) / n, "all-gather": n - 1, "collective-permute": 1}
        return size * factor.get(kind, (n - 1) / n)

    def kernel(self, i: Instruction, body: Computation, times: int) -> None:
        inside = self.computation(i, "calls") if i.operation == "fusion" else None
        operands = [body.instructions[o].arrays for o in i.operands]
        if i.operation == "copy-start":  # (destination, source, context)
            written, read = main_memory(i.arrays[:1]), main_memory(i.arrays[1:2])
        elif i.operation == "slice-start":  # ((source), destination, context)
            source, destination = i.arrays[:2]
            written = main_memory((destination,))
            read = destination.padded_size if main_memory((source,)) else 0
        elif i.operation in SLICES:
            read = written = main_memory(i.arrays)
        elif i.operation == UPDATE:
            read = written = main_memory(operands[1])
        elif inside is None:
            read = sum(map(main_memory, operands))
            # A product of a library also returns its workspace.
            written = main_memory(i.arrays[:1] if "matmul" in i.attributes else i.arrays)
        else:
            read = sum(self.read(inside, k, arrays) for k, arrays in enumerate(operands))
            written = self.written(inside, i.arrays)
        products = self.products([i], body)
        for product in products:
            self.traffic.products[product.kind] += times
            self.traffic.flops += times * product.flops
        slowed = sum(product.flops * self.slowed(product.kind) for product in products)
        seconds = max((read + written) / self.chip.bandwidth, slowed / self.chip.peak)
        kernel = Kernel(i.name, i.operation, times, read, written, seconds)
        self.traffic.kernels.append(kernel)

    def read(self, inside: Computation, number: int, arrays: tuple[Array, ...]) -> int:
        """The bytes of an operand that a fusion reads: only its slices, if it uses nothing else."""
        whole, total = main_memory(arrays), 0
        parameter = inside.parameter(number)
        names = [] if parameter is None else [parameter]
        if parameter is None or whole == 0:
            return 0 if parameter is not None else whole
        while names:
            name = names.pop()
            for i in inside.users(name):
                place = i.operands.index(name)
                called = self.computation(i, "calls") if i.operation == "fusion" else None
                # A gather from a converted operand converts only what it takes.
                converts = i.operation == "convert" and i is not inside.root
                unchanged = i.operation == "bitcast" or (called and self.passes(called, place))
                if converts or unchanged:
                    names.append(i.name)
                elif i.operation in SLICES and place == 0:
                    total += sum(a.padded_size for a in i.arrays)
                elif called:
                    total += self.read(called, place, arrays)
                elif i.operation != UPDATE or place > 0:
                    return whole
        return min(total, whole)

    def passes(self, called: Computation, number: int) -> bool:
        """Whether a fusion within a fusion returns its operand unchanged."""
        root = _behind_bitcasts(called, called.root)
        return root.operation == "parameter" and root.literal == str(number)

    def written(self, inside: Computation, arrays: tuple[Array, ...]) -> int:
        """The bytes that a fusion writes: its results; for an update in place, only the update."""
        root = _behind_bitcasts(inside, inside.root)
        if root.operation == "fusion":
            return self.written(self.computation(root, "calls"), arrays)
        parts = [root]
        if root.operation == "tuple":
            parts = [_behind_bitcasts(inside, inside.instructions[o]) for o in root.operands]
        updates = [part for part in parts if part.operation == UPDATE]
        whole = main_memory(arrays) - sum(main_memory(part.arrays) for part in updates)
        changed = (inside.instructions[part.operands[1]].arrays for part in updates)
        return max(whole, 0) + sum(a.padded_size for part in changed for a in part)

    def products(self, instructions: Iterable[Instruction], body: Computation) -> list[Product]:
        """The matrix products, including those in fusions."""
        found: list[Product] = []
        for i in instructions:
            if i.operation == "fusion":
                inner = self.computation(i, "calls")
                found += self.products(inner.instructions.values(), inner)
            elif i.operation in ("dot", "convolution") or (
                i.operation == "custom-call" and "matmul" in i.attributes
            ):
                factors = [body.instructions[o].arrays[0] for o in i.operands[:2]]
                flops = _operations(i, factors)
                if flops > SMALLEST_PRODUCT:
                    names = f"{factors[0].dtype}x{factors[1].dtype}>{i.arrays[0].dtype}"
                    found.append(Product(names + _precision(i), flops))
        return found

    def slowed(self, kind: str) -> float:
        if kind.endswith(":highest"):
            return self.chip.slowed_highest
        return self.chip.slowed_float32 if "f32" in kind.split(">")[0] else 1


def main_memory(arrays: tuple[Array, ...]) -> int:
    """The padded bytes of the arrays in the main memory."""
    return sum(a.padded_size for a in arrays if a.space == 0)


def _behind_bitcasts(computation: Computation, i: Instruction) -> Instruction:
    while i.operation == "bitcast":
        i = computation.instructions[i.operands[0]]
    return i


def _operations(i: Instruction, factors: list[Array]) -> float:
    """Two operations for each entry of the result and each term of its sum.

    If the text does not name the summed axes, m k n is computed as the root of the product of the
    sizes.
    """
    if summed := re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.attributes):
        terms = math.prod(factors[0].shape[int(k)] for k in summed[1].split(",") if k)
        return 2.0 * i.arrays[0].elements * terms
    return 2.0 * math.isqrt(math.prod(a.elements for a in (*factors, i.arrays[0])))


def _precision(i: Instruction) -> str:
    """The precision that a product requests, such as ":highest"; empty if it requests none."""
    found = re.search(r'operand_precision(?:=\{|":\[")(\w+)', i.attributes)
    asked = found[1].lower() if found else "default"
    return "" if asked == "default" else f":{asked}"
