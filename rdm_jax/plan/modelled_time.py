"""The time of a program compiled for a TPU, from the compiler's own estimate of every operation.

XLA's TPU compiler writes the cycles that it expects of an operation into the optimised program
(`estimated_cycles` in the text of `jax.stages.Compiled`). Their sum, loop bodies times their trips,
divided by the clock is a modelled time. It is an estimate, not a measurement: asynchronous copies
are not counted, and nothing that is counted overlaps. Pallas kernels carry no estimate; they are
counted at the roofline of their own `pallas.CostEstimate`, which is a lower bound.
"""

import collections
import dataclasses
import functools
import re
from collections.abc import Iterator

from rdm_jax.plan.chips import Chip

_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?(\S+) = (.*?) ([a-z][a-z0-9-]*)\((.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?(\S+) \(.*\{\s*$")
_CALLED = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)

# Kinds of work, each with what marks it in the names of JAX's primitives and of the functions that
# called them. The first that applies counts.
_KINDS = (
    (
        "random numbers",
        r"threefry|random_bits|_bernoulli|_uniform|_normal|_mask|fold_in|random_split",
    ),
    ("attention", r"\battend|dot_product_attention|flash_attention|splash"),
    (
        "optimizer and EMA",
        r"apply_updates|incremental_update|optimizer|adam|scale_by|keep\b|norm\b",
    ),
    ("normalisation", r"GroupNorm|LayerNorm|RMSNorm|unit_rms"),
)
KINDS = (
    "convolution",
    "matrix product",
    *(name for name, _ in _KINDS),
    "copies and pads",
    "collectives",
    "other",
)
_COPIES = {
    *("copy", "pad", "transpose", "reshape", "broadcast", "slice", "concatenate", "bitcast"),
    *("dynamic-slice", "dynamic-update-slice", "parameter", "constant", "tuple"),
    *("get-tuple-element", "iota", "convert", "reverse", "bitcast-convert"),
}


@dataclasses.dataclass(frozen=True)
class Operation:
    """An operation of the program that takes time.

    Attributes:
      name: in the program.
      kind: of work, one of `KINDS`.
      result: its type, such as 'bf16[16,64,64,192]'.
      cycles: of the chip's clock, in all trips of the loops around it.
      primitive: of JAX, with the transformations around it.
      line: of Python, innermost in this project: 'file.py:LINE function'; '' if unknown.
    """

    name: str
    kind: str
    result: str
    cycles: float
    primitive: str
    line: str


def operations(text: str, chip: Chip, package: str = "rdm_jax") -> list[Operation]:
    """The operations of a program that take time, the costliest first.

    Args:
      text: of the optimised program, `jax.stages.Compiled.as_text()`.
      chip: that it is compiled for.
      package: whose lines are shown, a part of their files' paths.
    """
    program = _Program(text, chip, package)
    return sorted(program.operations(program.entry, 1), key=lambda o: o.cycles, reverse=True)


def seconds(found: list[Operation], chip: Chip) -> float:
    """The modelled time."""
    return sum(operation.cycles for operation in found) / chip.clock


def by_kind(found: list[Operation]) -> dict[str, float]:
    """Each kind's share of the cycles, the largest first."""
    total = sum(operation.cycles for operation in found)
    sums: collections.Counter[str] = collections.Counter()
    for operation in found:
        sums[operation.kind] += operation.cycles
    return {kind: cycles / total for kind, cycles in sums.most_common()}


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    result: str
    opcode: str
    rest: str  # operands and attributes

    @functools.cached_property
    def called(self) -> list[str]:
        branches = _BRANCHES.search(self.rest)
        names = re.findall(r"[\w.-]+", branches[1]) if branches else []
        return names + _CALLED.findall(self.rest)


class _Program:
    """The computations of a program's text, and its table of Python's stack frames."""

    def __init__(self, text: str, chip: Chip, package: str):
        self._chip, self._package = chip, package
        self._computations: dict[str, list[_Instruction]] = {}
        self.entry, current = "", ""
        for line in text.splitlines():
            if head := _COMPUTATION.match(line):
                current = head[2]
                self._computations[current] = []
                self.entry = current if head[1] else self.entry
            elif current and (found := _INSTRUCTION.match(line)):
                name, result, opcode, rest = found.groups()
                shape = re.sub(r"\{[^}]*\}", "", result)
                self._computations[current].append(_Instruction(name, shape, opcode, rest))
        self._frames = _frames(text)

    def operations(self, computation: str, trips: int) -> Iterator[Operation]:
        for instruction in self._computations.get(computation, ()):
            if instruction.opcode == "while":
                body = re.search(r"body=%?([\w.-]+)", instruction.rest)
                assert body is not None
                yield from self.operations(body[1], trips * self._trips(instruction))
            elif cycles := self._cycles(instruction):
                yield self._operation(instruction, trips * cycles)
            elif instruction.opcode == "conditional":
                branches = [list(self.operations(name, trips)) for name in instruction.called]
                yield from max(branches, key=lambda b: sum(o.cycles for o in b), default=[])
            elif instruction.opcode in ("call", "async-start"):
                for name in instruction.called:
                    yield from self.operations(name, trips)

    def _cycles(self, instruction: _Instruction) -> float:
        if found := _CYCLES.search(instruction.rest):
            return float(found[1])
        if instruction.opcode == "custom-call" and "tpu_custom_call" in instruction.rest:
            flops, size = (
                float(found[1])
                if (found := re.search(rf'"{key}":"?(\d+)', instruction.rest))
                else 0
                for key in ("flops", "bytes_accessed")
            )
            return self._chip.clock * max(flops / self._chip.bfloat16, size / self._chip.bandwidth)
        return 0.0

    def _trips(self, loop: _Instruction) -> int:
        """Trips of a loop that counts from 0: the limit that its condition compares with."""
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
            return int(known[1])
        condition = re.search(r"condition=%?([\w.-]+)", loop.rest)
        found = self._computations.get(condition[1], []) if condition else []
        limits = [
            int(number[1])
            for i in found
            if i.opcode == "constant" and (number := re.match(r"(\d+)\)", i.rest))
        ]
        return max(limits, default=1)

    def _operation(self, instruction: _Instruction, cycles: float) -> Operation:
        primitive = re.search(r'op_name="([^"]*)"', instruction.rest)
        frame = re.search(r"stack_frame_id=(\d+)", instruction.rest)
        stack = self._frames.get(int(frame[1]), []) if frame else []
        ours = [place for place in stack if self._package in place[0]]
        line = ""
        if ours:
            path, number, function = ours[0]
            line = f"{path.rpartition('/')[2]}:{number} {function.rpartition('.<locals>.')[2]}"
        called_from = " ".join([primitive[1] if primitive else "", *(f for _, _, f in stack)])
        return Operation(
            name=instruction.name,
            kind=self._kind(instruction, called_from),
            result=instruction.result,
            cycles=cycles,
            primitive=primitive[1] if primitive else "",
            line=line,
        )

    def _kind(self, instruction: _Instruction, called_from: str) -> str:
        inner = [i for name in instruction.called for i in self._computations.get(name, ())] or [
            instruction
        ]
        opcodes = {i.opcode for i in inner}
        if any(instruction.opcode.startswith(name) for name in _COLLECTIVES):
            return "collectives"
        if re.search(_KINDS[1][1], called_from):
            return "attention"
        if opcodes & {"convolution", "dot"}:
            spatial = "conv_general_dilated" in called_from
            return "convolution" if spatial else "matrix product"
        if opcodes <= _COPIES:
            return "copies and pads"
        return next((kind for kind, mark in _KINDS if re.search(mark, called_from)), "other")


def _frames(text: str) -> dict[int, list[tuple[str, int, str]]]:
    """(file, line, function) of every stack frame and its callers, innermost first."""
    tables: dict[str, list[str]] = {}
    for block in text.split("\n\n"):
        head, *lines = block.strip().splitlines() or [""]
        tables[head.strip()] = lines

    def names(table: str) -> dict[int, str]:
        pairs = (re.match(r'(\d+) "(.*)"', line) for line in tables.get(table, ()))
        return {int(pair[1]): pair[2] for pair in pairs if pair}

    def numbers(table: str) -> dict[int, dict[str, int]]:
        rows = (re.match(r"(\d+) \{(.*)\}", line) for line in tables.get(table, ()))
        return {
            int(row[1]): {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", row[2])}
            for row in rows
            if row
        }

    files, functions = names("FileNames"), names("FunctionNames")
    locations, frames = numbers("FileLocations"), numbers("StackFrames")

    def stack(number: int) -> list[tuple[str, int, str]]:
        places = []
        while number in frames and len(places) < 100:
            location = locations.get(frames[number].get("file_location_id", 0), {})
            places.append(
                (
                    files.get(location.get("file_name_id", 0), ""),
                    location.get("line", 0),
                    functions.get(location.get("function_name_id", 0), ""),
                )
            )
            number = frames[number].get("parent_frame_id", 1) - 1  # they count from 1, 0 is none
        return places

    return {number: stack(number) for number in frames}
