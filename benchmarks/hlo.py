"""What a compiled program does on its device, read from the text of its HLO: launches, loops, branches, collectives."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

# Instructions that name, select or wait for a value and start nothing on the device.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier", "add-dependency"}
COLLECTIVES = {"all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute", "collective-broadcast"}

COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?[\s)}\]])([a-z][a-z0-9\-]*)\((.*)$")
CALLED = re.compile(r"\b(body|condition|to_apply|calls|\w+_computations?)=(\{.*?\}|%?[\w.\-]+)")


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    shape: str
    opcode: str
    rest: str  # operands and attributes

    @property
    def operation(self) -> str:
        """The opcode, without the halves of an asynchronous one."""
        return self.opcode.removesuffix("-start")

    @property
    def called(self) -> dict[str, list[str]]:
        """Names of the computations in each attribute."""
        return {key: re.findall(r"[\w.\-]+", names) for key, names in CALLED.findall(self.rest)}

    @property
    def op_name(self) -> str:
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""

    @property
    def target(self) -> str:
        found = re.search(r'custom_call_target="([^"]*)"', self.rest)
        return found[1] if found else ""

    @property
    def trips(self) -> int | None:
        """How often a loop runs, where the compiler knows it: then the host does not wait for its condition."""
        found = re.search(r'"known_trip_count":\{"n":"(\d+)"', self.rest)
        return int(found[1]) if found else None


@dataclass
class Part:
    """What runs one after the other, and the loops and conditionals in between."""

    kernels: int = 0
    library: list[str] = field(default_factory=list)  # calls that launch one kernel or more
    collectives: list[str] = field(default_factory=list)
    loops: list["Loop"] = field(default_factory=list)
    conditionals: list["Conditional"] = field(default_factory=list)

    @property
    def launches(self) -> int:
        """Kernels, with a library call and a collective as one."""
        return self.kernels + len(self.library) + len(self.collectives)


@dataclass
class Loop:
    """A loop; unless `trips` is known, the host waits for the condition before every iteration and after the last."""

    op_name: str
    body: Part
    condition: Part
    trips: int | None


@dataclass
class Conditional:
    """A choice, for which the host waits."""

    op_name: str
    branches: list[Part]


def computations(text: str) -> tuple[str, dict[str, list[Instruction]]]:
    """The name of the entry, and the instructions of every computation."""
    entry, found, current = "", {}, []
    for line in text.splitlines():
        if opened := COMPUTATION.match(line):
            current = found[opened[2]] = []
            entry = opened[2] if opened[1] else entry
        elif read := INSTRUCTION.match(line):
            current.append(Instruction(read[1], read[2].strip(), read[3], read[4]))
    if not entry:
        raise ValueError("The text has no entry computation.")
    return entry, found


def part(name: str, found: dict[str, list[Instruction]]) -> Part:
    """What a computation runs; `call` and asynchronous calls count as written out."""
    result = Part()
    for instruction in found[name]:
        called = instruction.called
        if instruction.opcode == "while":
            body, condition = (part(called[key][0], found) for key in ("body", "condition"))
            result.loops.append(Loop(instruction.op_name, body, condition, instruction.trips))
        elif instruction.opcode == "conditional":
            keys = "true_computation", "false_computation", "branch_computations"
            names = [name for key in keys for name in called.get(key, [])]
            result.conditionals.append(Conditional(instruction.op_name, [part(name, found) for name in names]))
        elif instruction.operation in ("call", "async"):
            inner = part(called.get("to_apply", called.get("calls"))[0], found)
            for key in ("library", "collectives", "loops", "conditionals"):
                getattr(result, key).extend(getattr(inner, key))
            result.kernels += inner.kernels
        elif instruction.operation in COLLECTIVES:
            result.collectives.append(instruction.operation)
        elif instruction.opcode == "custom-call":
            result.library.append(instruction.target)
        elif instruction.operation not in FREE and not instruction.opcode.endswith(("-done", "-update")):
            result.kernels += 1
    return result


def program(text: str) -> Part:
    """What a compiled program runs."""
    return part(*computations(text))


def walk(top: Part) -> Iterator[Part]:
    """The part and everything inside it."""
    yield top
    for loop in top.loops:
        yield from walk(loop.condition)
        yield from walk(loop.body)
    for choice in top.conditionals:
        for branch in choice.branches:
            yield from walk(branch)
