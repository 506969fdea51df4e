"""The layers of the package: who may import whom. Read from the sources, so that lazy imports count too."""

import ast
import re
import subprocess
import sys
import tomllib
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest
import yaml

from cai_ray.stages import STAGES

PACKAGE = Path(__file__).parents[2] / "cai_ray"

# The rooms of the package from the bottom up: a module imports from its own room and from rooms above it in this list.
ROOMS = (
    "errors",
    "stages",
    "compat",
    "constitution",
    "config",
    "storage",
    "prompts",
    "cluster",
    "engine",
    "town",
    "data",
    "provenance",
    "judging",
    "generate",
    "train",
    "evaluate",
    "report",
    "pipeline",
    "estimate",
    "begin",
    "export",
    "serve",
    "studies",
    "chat",
    "cli",
    "__main__",
)
# What configuration errors, constitutions, records and prompts need: no torch, no Ray.
LIGHT = ("errors", "stages", "constitution", "config", "storage", "prompts", "data", "provenance", "judging")
MODULES_AT_THE_TOP = 6
LIBRARIES = {"ray", "vllm", "deepspeed", "transformers", "peft", "liger_kernel", "torch"}
"""Their private parts are touched in compat/ alone."""
TABLE = "cai_ray.stages"
HEAVY = {"ray", "torch", "vllm", "transformers", "deepspeed", "peft", "accelerate"}


def sources() -> dict[str, Path]:
    """Every module of the package by its name; a package stands for its __init__."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = ["cai_ray", *path.relative_to(PACKAGE).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


SOURCES = sources()


def room(module: str) -> str:
    """The folder or module straight in the package that a module belongs to."""
    return module.split(".")[1] if "." in module else ""


def height(module: str) -> int:
    """The place of a module's room in ROOMS; the package's own __init__ stands below them all."""
    return ROOMS.index(room(module)) if room(module) else -1


@cache
def imports(module: str, top_level: bool = False) -> frozenset[str]:
    """Names of the modules that a module imports anywhere (or while it is imported).

    A string that is a module's name counts as well: importlib may be given it.
    """
    tree = ast.parse(SOURCES[module].read_text(encoding="utf-8"))
    found: set[str] = set()
    for node in _top_level(tree) if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import: write the whole name"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {n if n in SOURCES else str(node.module) for n in names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in SOURCES:
            found.add(node.value)
    if module == TABLE:  # it names the stages' modules; the pipeline imports them
        found = {name for name in found if name not in SOURCES}
    elif TABLE in found and module == "cai_ray.pipeline":
        found |= {name for stage in STAGES.values() for name in (stage.module, stage.checks) if name}
    return frozenset(found - {module, "cai_ray"})


def _top_level(tree: ast.AST):
    """Nodes that run on import: not in functions, not under `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from _top_level(node)


def reachable(start: str, without: str) -> set[str]:
    seen, todo = {without}, [start]
    while todo:
        module = todo.pop()
        if module not in seen and module in SOURCES:
            seen.add(module)
            todo += imports(module)
    return seen


@pytest.mark.parametrize("module", SOURCES)
def test_a_module_imports_its_own_room_or_lower_ones(module):
    upward = sorted(o for o in imports(module) & SOURCES.keys() if height(o) > height(module))
    assert not upward, f"{module} imports what stands above it: {upward}"


def test_no_module_imports_itself_in_a_circle():
    """While being imported, that is: a lazy import may close a circle."""
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " → ".join((*path[path.index(module) :], module))
        if module not in done:
            for other in sorted(imports(module, top_level=True) & SOURCES.keys()):
                visit(other, (*path, module))
            done.add(module)

    for module in SOURCES:
        visit(module, ())


@pytest.mark.parametrize("module", [m for m in SOURCES if room(m) in LIGHT])
def test_light_rooms_need_nothing_heavy(module):
    heavy = {name for name in imports(module, top_level=True) if name.split(".")[0] in HEAVY}
    assert not heavy, f"{module} imports {sorted(heavy)} at its top level"


def test_light_rooms_and_the_command_line_load_nothing_heavy():
    """The same by running it: what the imported packages load in their turn counts."""
    modules = [m for m in SOURCES if room(m) in LIGHT] + ["cai_ray.cli"]
    code = f"import sys, {', '.join(modules)}; print(*sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stdout.strip(), f"loaded: {done.stdout.strip()}"


def test_the_judge_is_for_the_corpus_and_evaluation():
    allowed = {"cai_ray.town.corpus"} | {m for m in SOURCES if m.startswith("cai_ray.evaluate")}
    users = {m for m in SOURCES if "cai_ray.town.judge" in imports(m)}
    assert users <= allowed, f"the exact judge is imported by {sorted(users - allowed)}"


@pytest.mark.parametrize(
    "module", [m for m in SOURCES if m.startswith(("cai_ray.train", "cai_ray.generate"))]
)
def test_training_and_generation_never_reach_the_judge(module):
    """Through no chain of imports but the data named `town:gold`, which a configuration must ask for."""
    assert "cai_ray.town.judge" not in reachable(module, without="cai_ray.data.town")


def test_gold_data_is_asked_for_to_calibrate_labels_alone():
    """The verdicts on development prompts fit one temperature (`label.gold`); nothing else reads them."""
    for path in sorted(PACKAGE.glob("configs/*.yaml")):
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
        data.get("label", {}).pop("gold", None)
        assert "town:gold" not in str(data), (
            f"{path.name} reads the exact judge's verdicts outside label.gold"
        )


def test_the_scripted_engine_is_made_by_the_factory_alone():
    users = {m for m in SOURCES if "cai_ray.engine.scripted" in imports(m)}
    assert users <= {"cai_ray.engine.make"}, f"the scripted engine is imported by {sorted(users)}"


def test_every_room_has_a_place_and_few_modules_stand_at_the_top():
    strangers = {room(m) for m in SOURCES if room(m)} - set(ROOMS)
    assert not strangers, f"give {sorted(strangers)} a place in ROOMS"
    top = [p.name for p in PACKAGE.glob("*.py") if p.name not in ("__init__.py", "__main__.py")]
    assert len(top) <= MODULES_AT_THE_TOP, f"{sorted(top)}: find a room for one"


@cache
def trees() -> dict[str, ast.Module]:
    return {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in SOURCES.items()}


@cache
def own_names() -> frozenset[str]:
    """Every name that the package itself defines: functions, classes, variables, attributes, arguments."""
    names = {"_asdict", "_replace", "_fields", "_exit"}  # of named tuples, and os._exit
    for tree in trees().values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                    names.add(node.attr)
            elif isinstance(node, ast.arg):
                names.add(node.arg)
    return frozenset(names)


def private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def private_parts(module: str) -> list[str]:
    """What a module imports or reads of the libraries that their authors keep to themselves."""
    parts = []
    for node in ast.walk(trees()[module]):
        if isinstance(node, ast.Import | ast.ImportFrom):
            source = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            paths = [".".join([*source, alias.name]) for alias in node.names]
            for path in paths:
                words = path.split(".")
                hidden = any(map(private, words)) or "internal_kv" in words or path.startswith("vllm.v1.")
                if words[0] in LIBRARIES and hidden:
                    parts.append(path)
        elif isinstance(node, ast.Attribute) and node.attr not in own_names():
            of_a_library = node.attr.startswith("__") and ast.unparse(node).split(".")[0] in LIBRARIES
            if private(node.attr) or of_a_library:
                parts.append(ast.unparse(node))
        elif isinstance(node, ast.keyword) and private(node.arg or "") and node.arg not in own_names():
            parts.append(f"{node.arg}=")
    return parts


@pytest.mark.parametrize("module", [m for m in SOURCES if room(m) != "compat"])
def test_private_parts_of_libraries_are_touched_in_compat_alone(module):
    assert not private_parts(module), f"{module}: move {private_parts(module)} to cai_ray/compat"


def test_private_parts_would_be_seen():
    seen = {part for m in SOURCES if room(m) == "compat" for part in private_parts(m)}
    assert {
        "ray._private.state.state",
        "ray.experimental.internal_kv._internal_kv_put",
        "deepspeed.ops.__compatible_ops__",
        "engine._global_grad_norm",
        "vllm.v1.engine.async_llm.AsyncLLM",
        "module._non_persistent_buffers_set",
    } <= seen


@pytest.mark.parametrize("module", [m for m in SOURCES if room(m) == "compat" and not m.endswith(".compat")])
def test_compat_names_the_pinned_version_of_its_library(module):
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    required = [
        *project["dependencies"],
        *(d for ds in project["optional-dependencies"].values() for d in ds),
    ]
    pins = dict(re.findall(r"^([\w-]+)(?:\[.*\])?==([\d.]+)$", "\n".join(required), re.MULTILINE))
    named = re.findall(r"^([\w-]+) (\d+(?:\.\d+)+):", ast.get_docstring(trees()[module]) or "", re.MULTILINE)
    assert named, (
        f"{module}: begin a paragraph of its docstring with library and version, `ray {pins['ray']}: …`"
    )
    assert all(pins[library] == version for library, version in named), f"{module}: {named}, pinned: {pins}"


MOST_LINES, MANY_LINES, FEW = 400, 300, 8


def test_files_are_short():
    """A file holds one idea: none has more than 400 lines, and few have more than 300."""
    lines = {m: len(path.read_text(encoding="utf-8").splitlines()) for m, path in SOURCES.items()}
    assert not [m for m, n in lines.items() if n > MOST_LINES]
    assert len([m for m, n in lines.items() if n > MANY_LINES]) <= FEW


def test_no_two_classes_have_one_name():
    places = defaultdict(set)
    for module, path in SOURCES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                places[node.name].add(module)
    twice = {name: sorted(modules) for name, modules in places.items() if len(modules) > 1}
    assert not twice, f"give each a name of its own: {twice}"
