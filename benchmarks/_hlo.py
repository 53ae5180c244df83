"""Figures read from a compiled program: they do not depend on the clock."""

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

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
    """Bytes accessed, temporary bytes, instructions, fusions and collectives."""
    text = compiled.as_text()
    lines = [Instruction(*found) for found in _LINE.findall(text)]
    collectives: dict[str, dict[str, int]] = {}
    for line in lines:
        if found := _COLLECTIVE.fullmatch(line.op):
            entry = collectives.setdefault(found[1], {"count": 0, "bytes": 0})
            entry["count"] += 1
            entry["bytes"] += sum(size for size, _ in _arrays(line.type))
    return {
        "bytes_accessed": compiled.cost_analysis()["bytes accessed"],
        "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "instructions": len(lines),
        "fusions": sum(line.op == "fusion" for line in lines),
        "collectives": collectives,
    }


def main_memory_bytes(text: str) -> int:
    """The bytes that a program for TPU moves from and to main memory (HBM).

    Other memories are marked in its types, ``S(1)`` the vector memory: what was fetched
    there ahead counts once, which "bytes accessed" counts twice. The body of a loop
    counts once, and of a conditional the branch that moves most.
    """
    computations = dict(_computations(text))

    def moved(name: str) -> int:
        lines = computations[name]
        types = {line.name: line.type for line in lines}
        total = 0
        for line in lines:
            if line.op == "while":
                total += moved(line.calls("body"))
            elif line.op == "call":
                total += moved(line.calls("to_apply"))
            elif line.op == "conditional":
                total += max(map(moved, line.branches))
            elif line.op in ("copy-start", "slice-start"):
                # The target is an element of the result; as much is read as written.
                source, target = _arrays(line.type)[:2]
                if line.op == "copy-start":
                    source, target = target, source
                total += target[0] * (source[1] + target[1])
            elif not _moves_nothing(line):
                arrays = [line.type, *(types[operand] for operand in line.operands)]
                total += sum(size for a in arrays for size, main in _arrays(a) if main)
        return total

    return moved("ENTRY")


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
