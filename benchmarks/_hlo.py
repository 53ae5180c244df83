"""Figures read from a compiled program: they do not depend on the clock."""

import itertools
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from optaxclip._norms import RARE

# One line of a program: name, type, operation, operands and attributes.
_LINE = re.compile(
    r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$", re.MULTILINE
)
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\](\{[^}]*\})?")
_COLLECTIVE = re.compile(
    r"(all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(-start)?"
)


class Instruction(NamedTuple):
    name: str
    type: str
    op: str
    rest: str  # operands and attributes

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.rest.split(")")[0])

    @property
    def branches(self) -> list[str]:
        if found := re.search(r"branch_computations=\{([^}]*)\}", self.rest):
            return re.findall(r"%?([\w.\-]+)", found[1])
        return [self.calls("true_computation"), self.calls("false_computation")]

    def calls(self, attribute: str) -> str:
        return re.findall(rf"{attribute}=%?([\w.\-]+)", self.rest)[0]


def figures(compiled: Any) -> dict[str, Any]:
    """Bytes moved, temporary bytes, instructions, fusions and collectives.

    Bytes moved and collectives are of an ordinary step. XLA's own "bytes accessed" has
    the dearest branch everywhere, and is missing for GPU.
    """
    text = compiled.as_text()
    program = Program(text)
    collectives: dict[str, dict[str, int]] = {}
    for line in program.ordinary():
        if found := _COLLECTIVE.fullmatch(line.op):
            entry = collectives.setdefault(found[1], {"count": 0, "bytes": 0})
            entry["count"] += 1
            entry["bytes"] += program.size_of_result(line)
    lines = [Instruction(*found) for found in _LINE.findall(text)]
    return {
        "bytes_accessed": (compiled.cost_analysis() or {}).get("bytes accessed"),
        "bytes_moved": program.bytes_moved(),
        "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "instructions": len(lines),
        "fusions": sum(line.op == "fusion" for line in program.ordinary()),
        "collectives": collectives,
    }


class Program:
    """A compiled program, read as it runs in an ordinary step.

    Of a conditional that is the branch that moves most, and for the sums that are taken
    again only where squares overflow or vanish, the one that moves least. The body of a
    loop counts once.
    """

    def __init__(self, text: str) -> None:
        self._computations = dict(_computations(text))
        lines = itertools.chain.from_iterable(self._computations.values())
        self._types = {line.name: line.type for line in lines}

    def size_of_result(self, line: Instruction) -> int:
        """In bytes. What starts a collective may have its operands in its type, too."""
        size = sum(size for size, _ in _arrays(line.type))
        if _holds_operands(line):
            types = (self._types[operand] for operand in line.operands)
            size -= sum(size for of in types for size, _ in _arrays(of))
        return size

    def ordinary(self, name: str = "ENTRY") -> Iterator[Instruction]:
        """The instructions that run, those of loops and branches in place."""
        for line in self._computations[name]:
            yield line
            for called in self._called(line):
                yield from self.ordinary(called)

    def bytes_moved(self, name: str = "ENTRY") -> int:
        """The bytes read from and written to main memory.

        Other memories are marked in the types of programs for TPU, ``S(1)`` the vector
        memory: what was fetched there ahead counts once, which XLA counts twice.
        """
        total = 0
        for line in self._computations[name]:
            called = self._called(line)
            total += sum(map(self.bytes_moved, called))
            if line.op in ("copy-start", "slice-start"):
                # The target is an element of the result; as much is read as written.
                source, target = _arrays(line.type)[:2]
                if line.op == "copy-start":
                    source, target = target, source
                total += target[0] * (source[1] + target[1])
            elif not called and not _moves_nothing(line):
                operands = [] if _holds_operands(line) else line.operands
                arrays = [line.type, *(self._types[operand] for operand in operands)]
                total += sum(size for a in arrays for size, main in _arrays(a) if main)
        return total

    def _called(self, line: Instruction) -> list[str]:
        if line.op == "while":
            return [line.calls("body")]
        if line.op == "call":
            return [line.calls("to_apply")]
        if line.op == "conditional":
            taken = min if RARE in line.rest else max
            return [taken(line.branches, key=self.bytes_moved)]
        return []


def _holds_operands(line: Instruction) -> bool:
    return line.op.endswith("-start") and line.type.startswith("((")


def _moves_nothing(line: Instruction) -> bool:
    names_only = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast"}
    done = line.op.endswith("-done") or "ConcatBitcast" in line.rest
    return line.op in names_only or done


def _computations(text: str) -> Iterator[tuple[str, list[Instruction]]]:
    head = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*->.*\{$", re.MULTILINE)
    heads = list(head.finditer(text))
    ends = [found.start() for found in heads[1:]] + [len(text)]
    for found, end in zip(heads, ends, strict=True):
        lines = _LINE.findall(text, found.end(), end)
        yield (
            "ENTRY" if found[1] else found[2],
            [Instruction(*line) for line in lines],
        )


def _arrays(type_: str) -> list[tuple[int, bool]]:
    """The size in bytes of each array of a type, and whether it is in main memory."""
    arrays = []
    for dtype, shape, layout in _ARRAY.findall(type_):
        bits = int(re.findall(r"\d+", dtype)[0]) if dtype != "pred" else 8
        elements = math.prod(int(n) for n in shape.split(",") if n)
        arrays.append((max(bits, 8) // 8 * elements, "S(" not in layout))
    return arrays
