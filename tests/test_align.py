"""Align as a whole: its recipes, its commands, and what is found before anything is paid for."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline import align, cli, config, conversations, expansion, prompts
from pipeline.config import Recipe
from pipeline.errors import UserError

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "configs" / "align"
RECIPES = sorted(path for path in FOLDER.glob("*.yaml") if path.name != "accelerate.yaml")
COMMANDS = ("prepare", "expand actor", "expand prompts", "expand reward", "actor", "rate", "reward", "rl", "all")
PROMPT = "---\nread: choices\nchoices:\n  - {value: 5, answers: [a]}\n  - {value: 0, answers: [b]}\n---\n{{ text }}\n"


@pytest.fixture(autouse=True)
def _in_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_align_recipe_names_a_prompt_that_loads_and_a_run_folder_of_its_own(path: Path) -> None:
    recipe = config.load_recipe(path, {})
    assert recipe.run_folder == Path("runs") / f"align-{path.stem}"
    assert recipe.rate.prompt is not None
    assert prompts.load(recipe.rate.prompt).read != "label"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_align_recipe_gives_arguments_that_the_trainers_take(path: Path) -> None:
    from peft import LoraConfig
    from trl import GRPOConfig, RLOOConfig, SFTConfig

    recipe = config.load_recipe(path, {})
    of_rl = {"grpo": GRPOConfig, "rloo": RLOOConfig}[recipe.rl.algorithm]
    for section, kind in ((recipe.actor, SFTConfig), (recipe.rl, of_rl)):
        assert set(section.args) <= {field.name for field in dataclasses.fields(kind)}
        assert set(section.lora) <= {field.name for field in dataclasses.fields(LoraConfig)}
        for name in (section.launch, section.args.get("deepspeed")):
            assert name is None or Path(name).is_file()


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_align_command_takes_every_align_recipe(
    path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["align", *command.split(), str(path), "--dry-run"])
    assert not stop.value.code
    assert yaml.safe_load(capsys.readouterr().out)["align"]


def test_the_shipped_rows_and_templates_can_be_read() -> None:
    recipe = config.load_recipe(FOLDER / "local.yaml", {})
    assert recipe.rate.prompt is not None
    taught, held_out = conversations.prompts(recipe)
    assert len(taught) > 20 and len(held_out) >= 5
    rows = conversations.of(recipe, "reward", ("completion",), prompts.load(recipe.rate.prompt).scale)
    assert {row.score for row in rows} >= {None, 0.0, 5.0}
    assert all(row.completion for row in conversations.of(recipe, "actor"))
    for key in expansion.KEYS.values():
        template, topics = expansion.templates(recipe.align.templates, key)
        assert "{{ examples }}" in template and len(set(topics)) == len(topics) > 20


@pytest.mark.parametrize("name", ["reply-en", "reply-demo"])
def test_the_prompts_for_replies_have_the_scale_of_the_shipped_rows(name: str) -> None:
    assert prompts.load(Path("prompts") / f"{name}.md").scale == (0, 5)


# -- before anything is paid for


def recipe(tmp_path: Path, model: Path, **settings: Any) -> Recipe:
    (tmp_path / "prompt.md").write_text(PROMPT, encoding="utf-8")
    rows = [{"user_input": f"What is {i}?", "completion": "A number.", "score": None} for i in range(30)]
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    data = dict.fromkeys(("actor_data", "prompt_data", "reward_data"), tmp_path / "rows.json")
    given = {
        "run_folder": tmp_path / "run",
        "teacher": {"model": str(model)},
        "rate": {"prompt": tmp_path / "prompt.md"},
        "encoder": {"model": str(model)},
        "actor": {"model": str(model)},
        "align": data,
    }
    return Recipe.model_validate(config.merge(given, settings))


def test_a_recipe_that_can_go_through_passes(tmp_path: Path, tiny_causal: Path) -> None:
    align.check_ahead(recipe(tmp_path, tiny_causal))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"actor": {"model": None}}, r"^actor\.model is not set"),
        ({"actor": {"model": "/nowhere"}}, r"^actor\.model: /nowhere does not exist"),
        ({"rate": {"prompt": None}}, r"^rate\.prompt is not set"),
        ({"rate": {"prompt": "none.md"}}, r"none\.md"),
        ({"teacher": {"model": None}}, r"^teacher\.model is not set"),
        ({"encoder": {"model": "/nowhere"}}, r"^encoder\.model: /nowhere does not exist"),
        ({"align": {"actor_data": "none.json"}}, r"^align\.actor_data: none\.json cannot be read"),
        ({"align": {"prompt_data": None}}, r"^align\.prompt_data is not set"),
        ({"align": {"reward_data": "none.json"}}, r"^align\.reward_data: none\.json cannot be read"),
        ({"align": {"source": "none.json"}}, r"^align\.source: none\.json does not exist"),
        ({"reward": {"preferences": "none.json"}}, r"^reward\.preferences: none\.json does not exist"),
        ({"reward": {"by": "/nowhere/to/be"}}, r"^reward\.by: /nowhere/to/be does not exist"),
        ({"reward": {"by": "model"}}, r"^reward\.model is not set"),
        ({"reward": {"by": "model", "model": "/nowhere/to/be"}}, r"^reward\.model: /nowhere/to/be does not exist"),
        ({"rl": {"args": {"num_generation": 4}}}, r"^rl\.args: 'num_generation' .* did you mean num_generations\?"),
        ({"rl": {"lora": {"alpha": 4}}}, r"^rl\.lora: 'alpha' is not an argument of LoraConfig"),
        ({"rl": {"launch": "none.yaml"}}, r"^rl\.launch: none\.yaml does not exist"),
        ({"rate": {"budget_usd": 1.0}}, r"^budget_usd: the price of .* is not known"),
        (
            {"align": {"reward_data": None, "replies_per_prompt": 0}},
            r"^align: only 0 replies would be rated, and a student learns from 20 or more",
        ),
    ],
)
def test_what_would_stop_a_later_step_is_found_before_the_first(
    tmp_path: Path, tiny_causal: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        align.check_ahead(recipe(tmp_path, tiny_causal, **settings))


def test_all_begins_with_prepare_only_where_a_source_is_named(
    tmp_path: Path, tiny_causal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    monkeypatch.setattr(cli, "execute", lambda stages, *_, **__: ran.extend([" ".join(stages)]))
    for settings in ({}, {"align": {"source": "pairs.json"}}):
        path = tmp_path / "recipe.yaml"
        path.write_text(recipe(tmp_path, tiny_causal, **settings).model_dump_json(), encoding="utf-8")
        with pytest.raises(SystemExit):
            cli.main(["align", "all", str(path)])
    assert ran == ["actor rate_replies reward rl", "prepare actor rate_replies reward rl"]
