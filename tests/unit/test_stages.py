"""The table of stages and roles: what it says is so, and nothing else says it again."""

import ast
from importlib import import_module
from inspect import signature
from pathlib import Path

import pytest

from cai_ray.config.run import RunConfig
from cai_ray.stages import (
    POLICIES,
    ROLES,
    STAGES,
    has_stage,
    maker_of,
    models_of,
    needs_of,
    roles_before,
    stages_of,
    upstream_of,
)

ROOT = Path(__file__).parents[2]
MODULES = sorted(
    path for folder in ("cai_ray", "benchmarks", "jobs") for path in (ROOT / folder).rglob("*.py")
)
# Facts about single stages or roles, by name, which only these modules state.
FACTS = {
    "benchmarks/overhead.py": "rows and calls of each part that is measured",
    "cai_ray/begin/plan.py": "usual learning rates",
    "cai_ray/data/town.py": "names of the town's prompt sets",
    "cai_ray/estimate/sample.py": "the prompts that each stage takes",
    "cai_ray/export/roles.py": "what a card says of a model or a stage",
    "cai_ray/studies/edit_cost.py": "engine calls of the stages that ask",
    "cai_ray/train/checks/families.py": "the models that each stage asks",
    "cai_ray/train/families/page.py": "headings of the table of families",
    "cai_ray/train/families/steps.py": "how a step of each stage is tried",
}


def named(node: ast.AST) -> list[str]:
    """Texts that a literal lists, or has as keys."""
    if isinstance(node, ast.Tuple | ast.List | ast.Set):
        items = node.elts
    else:
        items = [key for key in node.keys if key] if isinstance(node, ast.Dict) else []
    return [i.value for i in items if isinstance(i, ast.Constant) and isinstance(i.value, str)]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_other_module_lists_stages_or_roles(path: Path) -> None:
    if path == ROOT / "cai_ray/stages.py":
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Dict) and str(path.relative_to(ROOT)) in FACTS:
            continue
        for what, table in (("stages", STAGES), ("roles", ROLES)):
            listed = sorted(table.keys() & set(named(node)))
            assert len(listed) < 3, f"line {node.lineno}: a list of {what} ({listed}); read cai_ray.stages"


@pytest.mark.parametrize("path", sorted(FACTS))
def test_facts_are_about_stages_and_roles_that_exist(path: str) -> None:
    nodes = ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8")))
    keyed = [set(named(node)) for node in nodes if isinstance(node, ast.Dict)]
    assert any(len(keys & table.keys()) >= 3 for keys in keyed for table in (STAGES, ROLES)), (
        "no longer needed"
    )


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_has_what_its_entry_says(name: str) -> None:
    stage = STAGES[name]
    assert list(signature(import_module(stage.module).run).parameters) == ["run"]
    if stage.checks:
        checks = import_module(stage.checks)
        assert list(signature(checks.check).parameters) == ["run", "preflight"]
        assert list(signature(checks.check_room).parameters) == ["run"]
    assert set(stage.reads) <= RunConfig.model_fields.keys()
    order = list(STAGES)
    assert all(order.index(need) < order.index(name) for need in stage.needs)
    assert (stage.checks == "") == (stage.kind == "reads")


def test_each_method_has_its_stages_and_models() -> None:
    assert stages_of("ppo") == ["revise", "sft", "compare", "label", "rm", "ppo", "evaluate", "report"]
    assert stages_of("dpo") == ["revise", "sft", "compare", "label", "dpo", "evaluate", "report"]
    assert models_of("ppo") == {"sl": "sft", "rm": "rm", "rl": "ppo"}
    assert models_of("dpo") == {"sl": "sft", "rl": "dpo"}
    assert maker_of("base", "ppo") is None and maker_of("rm", "dpo") is None
    assert not has_stage("dpo", "rm") and has_stage("dpo", "redteam")


def test_what_a_stage_rests_on() -> None:
    assert needs_of("evaluate", "dpo") == ["sft", "label", "dpo"]
    assert upstream_of("rm", "ppo") == ["revise", "sft", "compare", "label"]
    assert upstream_of("revise", "ppo") == []
    assert roles_before("redteam") == ["base"] and roles_before("sft") == ["base"]
    assert roles_before("label") == roles_before("rm") == ["base", "sl"]
    assert roles_before("ppo") == ["base", "sl", "rm"] and roles_before("evaluate") == list(ROLES)


def test_policies_are_roles() -> None:
    assert set(POLICIES) < ROLES.keys()
