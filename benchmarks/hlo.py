"""What a compiled program does on its device, read from the text of its HLO: launches, loops, branches, bytes.

    entry = hlo.program(compiled.as_text())

The text is that of the optimized and scheduled program, so that instructions of a computation run in their order.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields

# Instructions that name or select a value, or wait for one, and start nothing on the device.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier", "add-dependency"}
FREE |= {"partition-id", "replica-id"}
COLLECTIVES = {"all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute", "collective-broadcast"}
BITS = {"pred": 8, "token": 0}  # of an element; all other types have their bits in their name

COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?[\s)}\]])([a-z][a-z0-9\-]*)\((.*)$")
CALLED = re.compile(r"\b(body|condition|to_apply|calls|\w+_computations?)=(\{.*?\}|%?[\w.\-]+)")
ARRAY = re.compile(r"\b(pred|token|[a-z]+(\d+)\w*)\[([\d,]*)\]")


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    shape: str
    opcode: str
    rest: str  # operands and attributes

    @property
    def operation(self) -> str:
        """The opcode; for an asynchronous one, that of its start."""
        return self.opcode.removesuffix("-start")

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.rest.split(")", 1)[0])

    @property
    def called(self) -> dict[str, list[str]]:
        """Names of the computations in each attribute."""
        return {key: re.findall(r"[\w.\-]+", names) for key, names in CALLED.findall(self.rest)}

    def attribute(self, pattern: str) -> str:
        found = re.search(pattern, self.rest)
        return found[1] if found else ""

    @property
    def op_name(self) -> str:
        """The path of the operation in the Python program."""
        return self.attribute(r'op_name="([^"]*)"')


def size(shape: str) -> int:
    """Bytes of all arrays in a shape."""
    bits = 0
    for dtype, own, dimensions in ARRAY.findall(shape):
        bits += math.prod(int(n) for n in dimensions.split(",") if n) * BITS.get(dtype, int(own or 0))
    return bits // 8


@dataclass
class Loop:
    """A loop. Unless `trips` is known, the host waits for the condition before every iteration and after the last."""

    op_name: str
    body: "Part"
    condition: "Part"
    trips: int | None


@dataclass
class Conditional:
    """A choice, for which the host waits. The first branch is that of false, or of zero."""

    op_name: str
    branches: list["Part"]


@dataclass
class Part:
    """What a computation runs, and the loops and conditionals in it."""

    kernels: int = 0
    library: list[str] = field(default_factory=list)  # library calls: a kernel or more each
    collectives: list[Instruction] = field(default_factory=list)
    bytes: int = 0  # results of what runs here, and of its operands what it uses, each counted once
    loops: list[Loop] = field(default_factory=list)
    conditionals: list[Conditional] = field(default_factory=list)

    @property
    def launches(self) -> int:
        """Kernels, library calls and collectives."""
        return self.kernels + len(self.library) + len(self.collectives)


def program(text: str) -> Part:
    """What a compiled program runs."""
    return _part(*_computations(text))


def walk(part: Part) -> Iterator[Part]:
    """The part and all parts inside it."""
    yield part
    for inner in _inner(part):
        yield from walk(inner)


@dataclass
class Cost:
    """What one run of a program does."""

    launches: float = 0
    library: float = 0  # of the launches, calls of libraries
    waits: float = 0  # how often the host waits for a number from the device to know what to launch next
    iterations: float = 0  # of loops for whose condition it waits
    bytes: float = 0
    sent: Counter[str] = field(default_factory=Counter)  # how often each collective ran, and with how many bytes

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(getattr(self, own.name) + getattr(other, own.name) for own in fields(self)))


def cost(part: Part, ran: Callable[[str, int], int], times: float = 1) -> Cost:
    """What a part does in some number of runs.

    Args:
      part: the program, or a part of it.
      ran: for an op_name and the number of a branch, or 0 for a loop, how often this branch or the body ran in all.
      times: how often the part itself runs.
    """
    sent = Counter({f"{line.operation} of {size(line.shape)} bytes": times for line in part.collectives if times})
    total = Cost(times * part.launches, times * len(part.library), 0, 0, times * part.bytes, sent)
    for loop in part.loops:
        turns = times * loop.trips if loop.trips is not None else ran(loop.op_name, 0)
        total += cost(loop.body, ran, turns)
        if loop.trips is None:
            total += cost(loop.condition, ran, turns + times) + Cost(waits=turns + times, iterations=turns)
    for choice in part.conditionals:
        total += Cost(waits=times)
        for i, branch in enumerate(choice.branches):
            total += cost(branch, ran, ran(choice.op_name, i))
    return total


def _inner(part: Part) -> list[Part]:
    loops = [inner for loop in part.loops for inner in (loop.condition, loop.body)]
    return loops + [branch for choice in part.conditionals for branch in choice.branches]


def _computations(text: str) -> tuple[str, dict[str, list[Instruction]]]:
    """The name of the entry, and the instructions of every computation."""
    entry, found, current = "", {}, []
    for line in text.splitlines():
        if opened := COMPUTATION.match(line):
            current = found[opened[2]] = []
            entry = opened[2] if opened[1] else entry
        elif read := INSTRUCTION.match(line):
            current.append(Instruction(read[1], read[2].strip(), read[3], read[4]))
    if not entry:
        raise ValueError("The text must have an entry computation.")
    return entry, found


def _part(name: str, found: dict[str, list[Instruction]]) -> Part:
    """What a computation runs; what it calls without a choice counts as written out."""
    part = Part()
    shapes = {instruction.name: instruction.shape for instruction in found[name]}
    for instruction in found[name]:
        called, opcode = instruction.called, instruction.opcode
        if opcode == "while":
            body, condition = (_part(called[key][0], found) for key in ("body", "condition"))
            trips = instruction.attribute(r'"known_trip_count":\{"n":"(\d+)"')
            part.loops.append(Loop(instruction.op_name, body, condition, int(trips) if trips else None))
        elif opcode == "conditional":
            keys = "false_computation", "true_computation", "branch_computations"
            names = [branch for key in keys for branch in called.get(key, [])]
            _check_order(names, instruction.op_name, found)
            part.conditionals.append(Conditional(instruction.op_name, [_part(branch, found) for branch in names]))
        elif instruction.operation in ("call", "async"):
            inner = _part((called.get("to_apply") or called["calls"])[0], found)
            part.kernels, part.bytes = part.kernels + inner.kernels, part.bytes + inner.bytes
            for own, more in (
                (part.library, inner.library),
                (part.collectives, inner.collectives),
                (part.loops, inner.loops),
                (part.conditionals, inner.conditionals),
            ):
                own.extend(more)
        elif opcode not in FREE and not opcode.endswith(("-done", "-update")):
            part.bytes += size(instruction.shape) + sum(_read(instruction, shapes, found).values())
            if instruction.operation in COLLECTIVES:
                part.collectives.append(instruction)
            elif opcode == "custom-call":
                part.library.append(instruction.attribute(r'custom_call_target="([^"]*)"'))
            else:
                part.kernels += 1
    return part


def _check_order(branches: list[str], op_name: str, found: dict[str, list[Instruction]]) -> None:
    """Raise an error if the names of operations say that the branches are in another order."""
    for i, branch in enumerate(branches):
        for instruction in found[branch]:
            said = re.match(re.escape(op_name) + r"/branch_(\d+)_fun", instruction.op_name)
            if said and int(said[1]) != i:
                raise ValueError(f"Branch {i} of {op_name} is called {said[1]} in {instruction.op_name}.")


def _read(instruction: Instruction, shapes: dict[str, str], found: dict[str, list[Instruction]]) -> dict[str, int]:
    """Bytes of each operand that an instruction uses: of those that it only cuts slices from, the slices."""
    if instruction.opcode in ("slice", "dynamic-slice"):
        return dict.fromkeys(instruction.operands[:1], size(instruction.shape))
    whole = {operand: size(shapes.get(operand, "")) for operand in instruction.operands}
    if instruction.opcode != "fusion":
        return whole
    inside = found[instruction.called["calls"][0]]
    own = {line.name: line.shape for line in inside}
    used: Counter[str] = Counter()
    for line in inside:
        used.update(_read(line, own, found))
    inputs = {int(line.rest.split(")")[0]): line.name for line in inside if line.opcode == "parameter"}
    return {operand: min(whole[operand], used[inputs[i]]) for i, operand in enumerate(instruction.operands)}
