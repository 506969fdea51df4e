"""Models that are prompted and judges: what a run leaves out or fills in, and what is refused."""

import json
from datetime import date
from pathlib import Path

import pytest

from cai_ray import constitution
from cai_ray.config.judge import JudgeConfig
from cai_ray.config.load import load_config
from cai_ray.errors import InputError
from cai_ray.prompts.models import make_renderer
from cai_ray.prompts.renderer import Renderer
from cai_ray.provenance.inputs import inputs
from cai_ray.storage.run import Run
from tests.tiny import CHATML, tokenizer

WORDS = tokenizer()
TURN = [{"role": "user", "content": "a"}]
ENDPOINT = "{kind: openai, base_url: 'http://h/v1'}"


def load(*overrides: str, out: Path | None = None) -> Run:
    return Run(load_config("errand-town", list(overrides), out=str(out) if out else None))


def test_a_judge_has_what_the_run_has_unless_it_says_otherwise() -> None:
    run = load("label.judge.template_args={enable_thinking: false}")
    model = run.resolve_model(run.config.label.judge)
    assert model.location == run.locate("base") and model.engine == run.config.engine
    assert (model.name, model.templates) == ("base", "errand-town")
    assert model.template_args == {"enable_thinking": False}
    assert run.resolve_model("sl") == run.resolve_model(JudgeConfig(model="sl"))
    own = load("label.judge={model: /m, engine: {kv_cache_mb: 9}, templates: general}")
    model = own.resolve_model(own.config.label.judge)
    assert (model.location, model.engine.kv_cache_mb, model.templates) == ("/m", 9, "general")
    assert own.resolve_model("base").engine.kv_cache_mb == own.config.engine.kv_cache_mb


def test_an_endpoint_knows_its_models_by_name_alone() -> None:
    run = load(f"label.judge={{model: sonnet, engine: {ENDPOINT}}}")
    model = run.resolve_model(run.config.label.judge)
    assert model.is_served and model.location == model.fetch() == "sonnet"
    base = load("model=org/m", f"label.judge.engine={ENDPOINT}")
    assert base.resolve_model(base.config.label.judge).location == "org/m"


def test_evaluation_and_watch_ask_the_labels_judge_unless_they_have_their_own() -> None:
    run = load("evaluate.gold=null").config
    assert run.evaluation_judge is run.watch_judge is run.label.judge
    own = load("evaluate={gold: null, judge: {model: /m}}", "ppo.watch.judge={model: /w}").config
    assert (own.evaluation_judge.model, own.watch_judge.model) == ("/m", "/w")
    assert own.evaluation_judge.principles == 1, "what it leaves out is not the labels' judge's"


def test_the_document_of_a_judge_is_its_own_or_the_run_s() -> None:
    run = load("without=[privacy]", "evaluate={gold: null, judge: {constitution: harmless}}").config
    assert run.document_of(run.label.judge) == run.document
    assert run.document_of(run.evaluation_judge) == constitution.load("harmless")


def test_only_a_reasoned_answer_is_clamped_by_default() -> None:
    assert JudgeConfig().clamp is None and JudgeConfig(ask="response").clamp is None
    assert JudgeConfig(answer="reasoned").clamp == (0.4, 0.6)
    assert JudgeConfig(answer="reasoned", clamp=None).clamp is None


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("label.judge={ask: response, answer: reasoned}", "answer=reasoned needs ask=pair"),
        ("label.judge.principles=0", "at least one principle must vote"),
        ("label.judge.template_args={tokenize: true}", "tokenize: the renderer itself sets it"),
        ("label.judge.ask=both", "'pair' or 'response'"),
        ("evaluate.judge={model: sl}", "gold=town says what is harmful, and no judge is asked"),
        ("ppo.watch={opinion: /rm, judge: {model: sl}}", "no judge is asked; leave out `judge`"),
        ("evaluate={gold: null, judge: {model: rm}}", "a reward model answers no question"),
        (
            f"evaluate={{gold: null, judge: {{model: rl, engine: {ENDPOINT}}}}}",
            "evaluate.judge.model=rl is made by",
        ),
        ("ppo.watch.judge.model=rl", "ppo.watch.judge.model=rl is not made yet"),
        ("revise.reviser={model: sl}", "revise.reviser.model=sl is not made yet"),
        ("revise.critique_model={model: m}", "critique_model"),
    ],
)
def test_judges_that_cannot_be_asked(override: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        load(override)


def test_the_inputs_of_a_stage_hold_what_its_judge_names(tmp_path: Path) -> None:
    (tmp_path / "compare").mkdir(parents=True)
    (tmp_path / "compare" / "manifest.json").write_text('{"id": "x"}')

    def label(*overrides: str) -> str:
        return inputs(load(*overrides, out=tmp_path), "label")["label"]

    assert label("label.judge.template_args={}") == label()
    changes = {
        label("label.judge.template_args={enable_thinking: false}"),
        label("label.judge.templates=general"),
        label("label.judge.constitution=harmless"),
        label("label.judge.engine={quantization: fp8}"),
    }
    assert len(changes) == 4 and label() not in changes
    copy = tmp_path / "c.yaml"
    copy.write_text(constitution.load("harmless").to_yaml())
    before = label(f"label.judge.constitution={copy}")
    copy.write_text(copy.read_text().replace("Which response", "What response"))
    assert label(f"label.judge.constitution={copy}") != before, "the document counts, not its name alone"


def test_template_arguments_reach_the_chat_template_and_nothing_else_changes() -> None:
    template = WORDS.chat_template + "{% if not enable_thinking | default(true) %}{{ eos_token }}{% endif %}"
    plain = Renderer(WORDS, template).prompt_ids(TURN)
    assert Renderer(WORDS, template, {}).prompt_ids(TURN) == plain
    assert Renderer(WORDS, template, {"enable_thinking": True}).prompt_ids(TURN) == plain
    without = Renderer(WORDS, template, {"enable_thinking": False}).prompt_ids(TURN)
    assert without == [*plain, WORDS.eos_token_id]


def test_template_arguments_of_the_run_are_those_of_its_own_models(tmp_path: Path) -> None:
    """A model from elsewhere has its own: its template may know no such argument."""
    run = load("template_args={enable_thinking: false, effort: low}", "chat_template=short")
    for role in ("base", "sl", "rl", "rm"):
        model = run.resolve_model(role)
        assert model.template_args == {"enable_thinking": False, "effort": "low"}
        assert model.chat_template == "short" and model.has_own_templates
    judge = JudgeConfig(model="base", template_args={"effort": "high"}, chat_template="long")
    model = run.resolve_model(judge)
    assert (
        model.template_args == {"enable_thinking": False, "effort": "high"} and model.chat_template == "long"
    )
    other = run.resolve_model(JudgeConfig(model="/elsewhere"))
    assert other.template_args == {} and other.chat_template is None and not other.has_own_templates
    with pytest.raises(InputError, match=r"template_args.*tokenize: the renderer itself sets it"):
        load("template_args={tokenize: true}")


def test_template_arguments_of_the_run_are_an_input_of_every_stage_that_renders(tmp_path: Path) -> None:
    for key in ("template_args={enable_thinking: false}", "chat_template=short"):
        for stage in ("revise", "redteam"):
            changed = inputs(load(key, out=tmp_path), stage)
            assert changed.keys() - inputs(load(out=tmp_path), stage).keys() == {key.split("=")[0]}


def test_a_template_set_is_for_the_models_that_it_was_chosen_for(tmp_path: Path) -> None:
    """Its chat template takes the place of their own, and stands in where a model from elsewhere has none."""
    words = tokenizer()
    words.chat_template = words.chat_template.replace("<|im_end|>", "<|im_end|>!")
    words.save_pretrained(tmp_path / "judge")
    bare = tokenizer()
    bare.chat_template = None
    bare.save_pretrained(tmp_path / "bare")
    (tmp_path / "set.yaml").write_text(f"extends: general\nname: own\nchat_template: {json.dumps(CHATML)}\n")
    run = load(f"templates={tmp_path / 'set.yaml'}", f"model={tmp_path / 'judge'}")

    def template(model: JudgeConfig | str) -> str:
        resolved = run.resolve_model(model)
        return make_renderer(resolved, resolved.location).template

    elsewhere = JudgeConfig(model=str(tmp_path / "judge") + "/")
    assert template("base") == CHATML and template(elsewhere) == words.chat_template
    assert template(JudgeConfig(model=str(tmp_path / "bare"))) == CHATML
    chosen = elsewhere.model_copy(update={"templates": str(tmp_path / "set.yaml")})
    assert template(chosen) == CHATML


def test_the_day_of_a_run_is_that_of_its_first_start(tmp_path: Path) -> None:
    assert load(out=tmp_path).today == date.today().isoformat()
    (tmp_path / "run.json").write_text('{"today": "2026-07-24"}')
    run = load(out=tmp_path)
    assert run.today == run.resolve_model("base").today == "2026-07-24"
