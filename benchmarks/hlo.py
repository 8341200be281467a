"""The text of an optimised HLO program, parsed into computations of instructions.

    %f.1 = f32[4096,1000]{0,1:T(8,128)S(1)} fusion(%x.1, %m), kind=kLoop, calls=%fused.1, ...

A line has a name, a type, an operation, operands and attributes. A type is an array or a tuple of
arrays. An array has a layout: the order of its dimensions from the fastest to the slowest, the
tiles T to which a TPU pads it, and its memory space S if this is not the main memory.
"""

import itertools
import math
import re
from dataclasses import dataclass

ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-<>]+) .*\{$")
INSTRUCTION = re.compile(r"\s+(ROOT )?%([\w.\-]+) = (.*)")
# The bits of a number; a token, and types that are not listed, take none.
BITS = {"pred": 8, "c64": 64, "c128": 128, "token": 0}


@dataclass(frozen=True)
class Array:
    """An array of a type; `tile` is None and `space` is 0 if the text does not contain them."""

    dtype: str
    shape: tuple[int, ...]
    minor_to_major: tuple[int, ...]
    tile: tuple[int, ...]
    space: int

    @property
    def elements(self) -> int:
        """The number of its elements."""
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """The bytes of the array without padding."""
        return -(-self.elements * _bits(self.dtype) // 8)

    @property
    def padded_size(self) -> int:
        """The bytes of the array if the fastest dimensions are padded to whole tiles."""
        order = self.minor_to_major or tuple(reversed(range(len(self.shape))))
        lengths = [self.shape[k] for k in order]
        for k, tile in enumerate(reversed(self.tile[-len(lengths) :] if lengths else ())):
            lengths[k] = -(-lengths[k] // tile) * tile
        return -(-math.prod(lengths) * _bits(self.dtype) // 8)


@dataclass(frozen=True)
class Instruction:
    """A line of a computation."""

    name: str  # its name, without the percent sign
    operation: str  # its operation, such as "fusion"
    arrays: tuple[Array, ...]  # the arrays of its type, in the order of the tuple if it is one
    operands: tuple[str, ...]  # names of instructions of the same computation
    literal: str  # the text between the parentheses: the number of a parameter, or a constant
    attributes: str  # the rest of the line

    def called(self, key: str) -> str | None:
        """The computation that an attribute names, such as `calls` of a fusion."""
        found = re.search(rf"\b{key}=%?([\w.\-<>]+)", self.attributes)
        return found and found[1]

    @property
    def computations(self) -> list[str]:
        """All computations that the attributes name: callees and branches."""
        return re.findall(r"%([\w.\-<>]+)", self.attributes.split("metadata=")[0])


@dataclass(frozen=True)
class Computation:
    """Instructions by name, in the order of the text, which is the order of execution."""

    instructions: dict[str, Instruction]
    root: Instruction

    def parameter(self, number: int) -> str | None:
        """The name of a parameter; None if it is not used."""
        for name, instruction in self.instructions.items():
            if instruction.operation == "parameter" and instruction.literal == str(number):
                return name
        return None

    def users(self, name: str) -> list[Instruction]:
        """The instructions that have this operand."""
        return [i for i in self.instructions.values() if name in i.operands]


@dataclass(frozen=True)
class Program:
    """The computations of a module by name, and the name of its entry."""

    computations: dict[str, Computation]
    entry: str
    partitions: int


def read(text: str) -> Program:
    """Parses a program from the text of `compiled.as_text()`."""
    computations: dict[str, Computation] = {}
    name = entry = ""
    instructions: dict[str, Instruction] = {}
    root = ""
    for line in text.splitlines():
        if (found := COMPUTATION.match(line)) and not line.startswith(" "):
            name, instructions, root = found[2], {}, ""
            entry = name if found[1] else entry
        elif name and (found := INSTRUCTION.match(line)):
            instructions[found[2]] = _instruction(found[2], found[3])
            root = found[2] if found[1] else root
        elif name and line == "}":
            computations[name] = Computation(instructions, instructions[root])
            name = ""
    if entry not in computations:
        raise ValueError(f"hlo: the text must have an ENTRY computation, got {text[:60]!r}.")
    found = re.search(r"num_partitions=(\d+)", text)
    return Program(computations, entry, int(found[1]) if found else 1)


def arrays(text: str) -> tuple[Array, ...]:
    """The arrays of a type."""
    return tuple(_array(*found) for found in ARRAY.findall(text))


def _array(dtype: str, shape: str, layout: str) -> Array:
    order, _, memory = layout.partition(":")
    tile = re.search(r"T\(([\d,]+)\)", memory)
    space = re.search(r"S\((\d+)\)", memory)
    return Array(dtype, _integers(shape), _integers(order), _integers(tile[1]) if tile else (),
                 int(space[1]) if space else 0)  # fmt: skip


def _instruction(name: str, text: str) -> Instruction:
    """Parses the text of a line after `%name = `."""
    text = re.sub(r"/\*.*?\*/", "", text)
    end = _closing(text) + 1 if text.startswith("(") else text.index(" ")
    found = re.match(r" *([\w\-]+)\(", text[end:])
    if found is None:
        raise ValueError(f"hlo: a line must have an operation after its type, got {text[:80]!r}.")
    opening = end + found.end() - 1
    closing = opening + _closing(text[opening:])
    literal = text[opening + 1 : closing]
    operands = tuple(re.findall(r"%([\w.\-]+)", literal))
    return Instruction(name, found[1], arrays(text[:end]), operands, literal, text[closing + 1 :])


def _closing(text: str) -> int:
    """The position of the parenthesis that closes the first one."""
    depths = itertools.accumulate((c == "(") - (c == ")") for c in text)
    return next(place for place, depth in enumerate(depths) if depth == 0)


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(",") if n)


def _bits(dtype: str) -> int:
    """The bits of a number: the first number in a name such as f32, bf16, s4 or f8e4m3fn."""
    if dtype in BITS:
        return BITS[dtype]
    found = re.search(r"\d+", dtype)
    return int(found[0]) if found else 0
