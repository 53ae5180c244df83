"""Imports run one way: see `docs/architecture.md`."""

import ast
import functools
import pathlib
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[2]
PACKAGE = ROOT / "optaxclip"  # read, not imported: a wrong import may be circular

# From the bottom to the top. A room is a folder or a module; "" is `optaxclip` itself.
FLOORS = [
    {"_checks", "_show"},
    {"_norms"},
    {"_thresholds"},
    {"_kernel"},
    {"_transforms"},
    {"_state"},
    {"rules", "unit_axes", "contrib"},
    {""},
    {"audit._text"},
    {"audit._log"},
    {"audit._what_if"},
    {"audit._report"},
    {"audit._clip_log", "audit._watch"},
    {"audit._commands"},
    {"audit._cli"},
    {"audit"},
    {"__main__"},
]
FLOOR = {room: i for i, floor in enumerate(FLOORS) for room in floor}

LONGEST = 280  # lines of a module
LONGER: set[str] = set()  # still to be split


class Import(NamedTuple):
    """One name of an import statement; of `import a.b` the name is None."""

    where: str  # file and line, for messages
    importer: str  # the importing module, dotted; a path if outside of the package
    module: str
    name: str | None
    bound: str  # the name that the importing module knows it by

    def rooms(self):
        """The room that imports and the one that is imported from."""
        return room_of(self.importer), room_of(self.target())

    def target(self):
        """The module that is imported, or that the name is taken from."""
        whole = f"{self.module}.{self.name}"
        return whole if whole in modules() else self.module


@functools.cache
def modules():
    """Every module of the package by its dotted name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


def room_of(module):
    parts = module.split(".")[1:]
    return ".".join(parts[: 2 if parts[:1] == ["audit"] else 1])


def is_folder(room):
    return (
        room not in ("", "audit", "contrib")
        and (PACKAGE / room.replace(".", "/")).is_dir()
    )


def tree_of(path):
    return ast.parse(path.read_text(), str(path))


def imports_of(importer, path):
    for node in ast.walk(tree_of(path)):
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        where = f"{path.relative_to(ROOT)}:{node.lineno}"
        for alias in node.names:
            if isinstance(node, ast.Import):
                found = Import(where, importer, alias.name, None, alias.asname or "")
            else:
                assert not node.level, f"{where}: import absolutely"
                bound = alias.asname or alias.name
                found = Import(where, importer, node.module, alias.name, bound)
            if found.module.partition(".")[0] == "optaxclip":
                yield found


@functools.cache
def inner_imports():
    """What modules of the package import from it."""
    return [x for name, path in modules().items() for x in imports_of(name, path)]


@functools.cache
def handed_on():
    """For every folder the names that its `__init__` has, with where each stands."""
    names = {}
    for module, path in modules().items():
        room = room_of(module)
        if not is_folder(room) or path.name != "__init__.py":
            continue
        relative = path.relative_to(ROOT)
        names[room] = {}
        for node in tree_of(path).body:
            where = f"{relative}:{node.lineno}"
            if isinstance(node, ast.FunctionDef):
                names[room][node.name] = where
            elif isinstance(node, ast.ImportFrom):  # `x as x` hands on, `x` does not
                again = [x.name for x in node.names if x.name == x.asname]
                names[room] |= dict.fromkeys(again, where)
    return names


def none(problems):
    assert not problems, "\n" + "\n".join(problems)


def test_every_module_has_a_floor():
    none([name for name in modules() if room_of(name) not in FLOOR])


def test_imports_run_down():
    upward = []
    for x in inner_imports():
        importer, imported = x.rooms()
        is_lazy = (importer, imported) in [
            ("", "audit"),  # for type checkers alone
            ("audit._log", "audit._report"),  # a log draws itself, when it is asked to
        ]
        if importer != imported and FLOOR[importer] <= FLOOR[imported] and not is_lazy:
            upward.append(f"{x.where}: {x.importer} must not import {x.target()}")
    none(upward)


def test_only_the_outside_reads_states():
    rooms = {"_state", ""} | {room for room in FLOOR if room.startswith("audit")}
    found = [x for x in inner_imports() if x.rooms()[1] == "_state"]
    none([f"{x.where}: imports `_state`" for x in found if x.rooms()[0] not in rooms])


def test_a_folder_is_entered_by_its_init():
    wrong = []
    for x in inner_imports():
        importer, room = x.rooms()
        if importer == room or not is_folder(room):
            continue
        folder = f"optaxclip.{room}"
        if folder == f"{x.module}.{x.name}":
            continue  # the folder itself
        if x.module != folder:
            wrong.append(f"{x.where}: import from {folder}, not from {x.module}")
        elif x.name is None or x.name.startswith("_"):
            wrong.append(f"{x.where}: {x.name or x.module} is private to {folder}")
        elif x.name not in handed_on()[room]:
            wrong.append(
                f"{x.where}: the `__init__` of {folder} does not hand on {x.name}"
            )
    none(wrong)


def test_an_init_hands_on_what_others_use():
    used = set()
    everything = modules() | {str(p): p for p in ROOT.glob("benchmarks/*.py")}
    for importer, path in everything.items():
        for x in imports_of(importer, path):
            room = room_of(x.target())
            if importer in modules() and room_of(importer) == room:
                continue
            used.add((room, x.name))
            if f"optaxclip.{room}" == x.target():  # perhaps the folder as a whole
                used |= {(room, name) for name in attributes(path, x.bound)}
    none(
        [
            f"{where}: nobody outside {room} imports {name}"
            for room, names in handed_on().items()
            for name, where in names.items()
            if (room, name) not in used
        ]
    )


def attributes(path, name):
    """The attributes that a module takes from what it knows by a name."""
    for node in ast.walk(tree_of(path)):
        owner = getattr(node, "value", None)
        if isinstance(node, ast.Attribute) and isinstance(owner, ast.Name):
            yield from [node.attr] if owner.id == name else []


def test_modules_are_short():
    lengths = {
        str(path.relative_to(PACKAGE)): len(path.read_text().splitlines())
        for path in modules().values()
    }
    long = {name for name, length in lengths.items() if length > LONGEST}
    none([f"{name}:{LONGEST}: {lengths[name]} lines" for name in long - LONGER])
    none([f"{name} is short now: remove it from LONGER" for name in LONGER - long])
