"""Several opinions on each document, named scores, calibration, budgets, plans and probes, at a real HTTP server."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import stamina
from endpoint import (
    CHOICES,
    Asked,
    Reply,
    changed,
    corpus,
    error,
    gristmill,
    likes,
    number,
    one_line,
    ratings,
    recipe,
    reply,
    says,
    serve,
    write,
)

from pipeline import panel, plan, probe, prompts, rate
from pipeline.consensus import pairwise, verdict
from pipeline.errors import UserError
from pipeline.pairs import as_dict
from pipeline.reading import Reading, read_json


@pytest.fixture(autouse=True)
def _no_pauses() -> Iterator[None]:
    with stamina.set_testing(True, attempts=100, cap=True):
        yield


def by_seed(asked: Asked) -> Reply:
    """doc-<n> is worth n modulo 4, plus one with every odd seed."""
    return says(f"Score: {number(asked) % 4 + asked.body.get('seed', 0) % 2}")


# -- repeats, prompts, teachers


def test_repeats_are_asked_with_other_seeds_and_every_answer_is_kept(tmp_path: Path) -> None:
    with serve(by_seed) as server:
        r = recipe(tmp_path, server.url, n=12, rate={"repeats": 3}, temperature=0.7)
        result = rate.run(r)
    assert sorted({asked.body["seed"] for asked in server.asked}) == [0, 1, 2]
    assert (result.n_raters, result.n_asked) == (3, 36)
    row = ratings(r)["id-5"]
    assert [opinion["score"] for opinion in row["opinions"]] == [1.0, 2.0, 1.0]
    assert [opinion["repeat"] for opinion in row["opinions"]] == [0, 1, 2]
    assert row["score"] == pytest.approx(4 / 3)
    assert row["spread"] == pytest.approx(np.std([1, 2, 1], ddof=1))
    assert row["n_opinions"] == 3


def test_the_median_is_not_moved_by_one_odd_opinion(tmp_path: Path) -> None:
    with serve(lambda asked: says(f"Score: {5 if asked.body['seed'] == 2 else 1}")) as server:
        r = recipe(tmp_path, server.url, rate={"repeats": 3, "consensus": "median"}, temperature=1.0)
        rate.run(r)
        assert {row["score"] for row in ratings(r).values()} == {1.0}
        rate.run(changed(r, "rate", consensus="mean"), redo=True)
        assert [row["score"] for row in ratings(r).values()] == pytest.approx([7 / 3] * 8)
        assert server.attempts().total() == 24, "another consensus asks nothing"


def test_one_more_repeat_asks_only_the_new_one(tmp_path: Path) -> None:
    with serve(by_seed) as server:
        r = recipe(tmp_path, server.url, temperature=0.7)
        rate.run(r)
        assert rate.run(changed(r, "rate", repeats=2), redo=True).n_asked == 8


def test_repeats_that_could_not_differ_are_refused_before_anything_is_asked(tmp_path: Path) -> None:
    with serve(by_seed) as server:
        r = recipe(tmp_path, server.url, rate={"repeats": 2})
        with pytest.raises(UserError, match="would say the same 2 times"):
            rate.run(r)
        with pytest.raises(UserError, match="lists no choices"):
            rate.run(changed(r, "rate", permute=True))
    assert not server.asked


def test_teachers_and_prompts_multiply_and_their_agreement_is_kept(tmp_path: Path) -> None:
    """The second teacher gives one point more to every document: same order, lower kappa, a difference of one."""

    def answer(asked: Asked) -> Reply:
        return says(f"Score: {number(asked) % 5 + (asked.body['model'] == 'generous')}")

    (tmp_path / "other.md").write_text("---\nread: generate\n---\nGrade it: {{ text }}\nScore:\n", encoding="utf-8")
    with serve(answer) as server:
        rates = {"more_teachers": [{"model": "generous"}], "more_prompts": [tmp_path / "other.md"]}
        r = recipe(tmp_path, server.url, n=30, rate=rates)
        result = rate.run(r)
    assert [(each["prompt"], each["teacher"]) for each in result.opinions] == [
        ("prompt", "m"),
        ("other", "m"),
        ("prompt", "generous"),
        ("other", "generous"),
    ]
    between = {each["between"]: each for each in result.agreement}
    assert set(between) == {"prompt and other", "m and generous"}
    assert between["prompt and other"]["kappa"] == pytest.approx(1.0)
    teachers = between["m and generous"]
    assert teachers["spearman"] == pytest.approx(1.0)
    # 6 documents of each of 0..4 against one more: 1 - sum of squared misses / the expected one
    a, b = np.repeat(np.arange(5), 6), np.repeat(np.arange(5) + 1, 6)
    expected = np.mean((a[:, None] - b[None, :]) ** 2)
    assert teachers["kappa"] == pytest.approx(1 - 1 / expected)
    assert teachers["kappa_interval"][0] < teachers["kappa"] < teachers["kappa_interval"][1]


def test_two_teachers_of_one_model_are_told_apart_and_equal_ones_refused(tmp_path: Path) -> None:
    with serve(by_seed) as server:
        r = recipe(tmp_path, server.url, rate={"more_teachers": [{"temperature": 0.5}]})
        rate.run(r)
        assert {opinion["teacher"] for opinion in ratings(r)["id-1"]["opinions"]} == {"m", "m (temperature 0.5)"}
        with pytest.raises(UserError, match="would be the same answer as"):
            rate.run(changed(r, "rate", more_teachers=[{"timeout_s": 9}]))


def test_a_misspelled_setting_of_a_further_teacher_is_named(tmp_path: Path) -> None:
    r = recipe(tmp_path, "http://127.0.0.1:9/v1", rate={"more_teachers": [{"modell": "x"}]})
    line = gristmill(r)
    assert line.code == 2
    assert "rate.more_teachers.0" in line.stderr
    assert "modell" in line.stderr


def test_further_teachers_are_flags_too(tmp_path: Path) -> None:
    with serve(by_seed) as server:
        r = recipe(tmp_path, server.url)
        done = gristmill(r, "rate", "--more-teachers", json.dumps({"model": "second"}), "--json")
    assert done.code == 0, done.stderr
    assert [each["teacher"] for each in json.loads(done.stdout)["rate"]["opinions"]] == ["m", "second"]


def test_prompts_on_other_scales_are_refused(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("---\nread: generate\nscale: [0, 9]\n---\n{{ text }}\n", encoding="utf-8")
    with pytest.raises(UserError, match="other has another scale"):
        rate.run(recipe(tmp_path, "http://127.0.0.1:9/v1", rate={"more_prompts": [tmp_path / "other.md"]}))


def test_a_document_that_one_rater_could_not_score_keeps_the_other_opinions(tmp_path: Path) -> None:
    def answer(asked: Asked) -> Reply:
        return says("banana" if asked.body["model"] == "odd" and number(asked) == 2 else "Score: 4")

    with serve(answer) as server:
        r = recipe(tmp_path, server.url, rate={"more_teachers": [{"model": "odd"}]})
        rate.run(r)
    row = ratings(r)["id-2"]
    assert (row["score"], row["reason"], row["n_opinions"], row["spread"]) == (4.0, None, 1, None)
    assert [opinion["reason"] for opinion in row["opinions"]] == [None, "no_score"]


def test_without_any_opinion_the_commonest_reason_stands() -> None:
    readings = [Reading(None, "truncated"), Reading(None, "refused"), Reading(None, "truncated")]
    assert verdict(readings, np.mean)[:2] == (None, "truncated")


def test_agreement_of_three_raters_is_the_mean_over_their_pairs() -> None:
    scores = np.array([[0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [4, 3, 2, 1, 0]], dtype=np.float64)
    found = pairwise(scores, (0, 5))
    assert found["spearman"] == pytest.approx((1 - 1 - 1) / 3)
    assert found["kappa"] == pytest.approx((1 - 1 - 1) / 3)
    scores[0, 0] = np.nan
    assert pairwise(scores, (0, 5))["n"] == 4


# -- order of choices, calibration


LISTED = {
    **CHOICES,
    "body": "One of:\n{{ choices }}\n\n<text>\n{{ text }}\n</text>",
    "choices": [
        {"value": 5, "answers": [" good"], "meaning": "worth keeping"},
        {"value": 2, "answers": [" fair"], "meaning": "so so"},
        {"value": 0, "answers": [" bad"], "meaning": "not worth it"},
    ],
}


def test_permuted_choices_are_shown_in_other_orders_and_read_the_same(tmp_path: Path) -> None:
    with serve(lambda _: likes({" good": math.log(0.6), " bad": math.log(0.2), " fair": math.log(0.2)})) as server:
        r = recipe(tmp_path, server.url, prompt=LISTED, rate={"repeats": 3, "permute": True})
        rate.run(r)
    orders = {asked.shown.split("<text>")[0] for asked in server.asked}
    assert len(orders) == 3
    assert all(sorted(order.splitlines()) == sorted(next(iter(orders)).splitlines()) for order in orders)
    assert [row["score"] for row in ratings(r).values()] == pytest.approx([5 * 0.6 + 2 * 0.2] * 8)


def test_calibration_takes_off_what_an_empty_document_gets(tmp_path: Path) -> None:
    """The teacher says good three times in four to nothing at all: p / prior, normalised (arXiv:2102.09690)."""

    def answer(asked: Asked) -> Reply:
        good = 0.9 if "doc-" in asked.shown else 0.75
        return likes({" good": math.log(good), " bad": math.log(1 - good)})

    with serve(answer) as server:
        r = recipe(tmp_path, server.url, prompt=CHOICES, rate={"calibrate": True})
        rate.run(r)
        assert len(server.asked) == 9, "eight documents and an empty one"
        calibrated = (0.9 / 0.75) / (0.9 / 0.75 + 0.1 / 0.25)
        assert [row["score"] for row in ratings(r).values()] == pytest.approx([5 * calibrated] * 8)
        rate.run(changed(r, "rate", calibrate=False), redo=True)
        assert [row["score"] for row in ratings(r).values()] == pytest.approx([4.5] * 8)


def test_calibration_of_written_answers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="must have read: choices"):
        rate.run(recipe(tmp_path, "http://127.0.0.1:9/v1", rate={"calibrate": True}))


# -- probabilities


def test_ratings_carry_the_mean_probability_of_each_value(tmp_path: Path) -> None:
    """Of two raters one is surer than the other; choices of the same value count together."""

    def answer(asked: Asked) -> Reply:
        good, fair, bad = (0.5, 0.25, 0.25) if asked.body["model"] == "m" else (0.8, 0.2, 0.0)
        return likes({name: math.log(p) for name, p in ((" good", good), (" fair", fair), (" bad", bad)) if p})

    two_of_a_value = [{"value": 5, "answers": [" good"]}, {"value": 0, "answers": [" fair"]}]
    prompt = {"read": "choices", "choices": [*two_of_a_value, {"value": 0, "answers": [" bad"]}]}
    with serve(answer) as server:
        r = recipe(tmp_path, server.url, prompt=prompt, rate={"more_teachers": [{"model": "other"}]})
        rate.run(r)
    for row in ratings(r).values():
        assert as_dict(row["probabilities"]) == {0.0: pytest.approx(0.35), 5.0: pytest.approx(0.65)}
        assert row["score"] == pytest.approx(sum(value * p for value, p in as_dict(row["probabilities"]).items()))


@pytest.mark.parametrize("change", [{"normalise": False}, {"line": {"offset": 1.0, "slope": 0.5}}])
def test_a_score_that_is_no_expected_value_has_no_probabilities(tmp_path: Path, change: dict[str, Any]) -> None:
    with serve(lambda _: likes({" good": math.log(0.6), " bad": math.log(0.2)})) as server:
        r = recipe(tmp_path, server.url, prompt={**CHOICES, **change})
        rate.run(r)
    assert {(row["reason"], row["probabilities"]) for row in ratings(r).values()} == {(None, None)}


def test_one_written_opinion_among_them_leaves_no_probabilities() -> None:
    sure, written = Reading(4.0, probabilities={5.0: 0.8, 0.0: 0.2}), Reading(4.0)
    unread = Reading(None, "no_score")
    assert verdict([sure, sure], np.mean).probabilities == {5.0: pytest.approx(0.8), 0.0: pytest.approx(0.2)}
    assert verdict([sure, unread], np.mean).probabilities == {5.0: 0.8, 0.0: 0.2}
    assert verdict([sure, written], np.mean).probabilities is None
    assert verdict([unread], np.mean).probabilities is None


# -- named scores

JSON_PROMPT = {"read": "json", "attributes": {"value": [0, 5], "clarity": [0, 5], "toxicity": [0, 1]}}


def asking_json(tmp_path: Path, **front: Any) -> prompts.Prompt:
    path = tmp_path / "json.md"
    path.write_text(f"---\n{json.dumps({**JSON_PROMPT, **front})}\n---\n{{{{ text }}}}\n", encoding="utf-8")
    return prompts.load(path)


def test_each_named_score_becomes_a_column(tmp_path: Path) -> None:
    def answer(asked: Asked) -> Reply:
        n = number(asked)
        return says(f'Here you are: {{"value": {n % 6}, "clarity": 2.5, "toxicity": 0.1}}')

    with serve(answer) as server:
        r = recipe(tmp_path, server.url, prompt=JSON_PROMPT)
        result = rate.run(r)
    row = ratings(r)["id-3"]
    assert (row["score"], row["value"], row["clarity"], row["toxicity"]) == (3.0, 3.0, 2.5, 0.1)
    assert result.attributes == {"value": pytest.approx(1 / 8 * sum(n % 6 for n in range(8))), "clarity": 2.5} | {
        "toxicity": pytest.approx(0.1)
    }
    schema = pq.read_schema(r.run_folder / "rate" / "ratings.parquet")
    assert json.loads(schema.metadata[b"attributes"]) == {"value": [0, 5], "clarity": [0, 5], "toxicity": [0, 1]}


@pytest.mark.parametrize(
    ("answer", "score", "attributes"),
    [
        ('{"value": 4, "clarity": 3, "toxicity": 0}', 4, {"value": 4, "clarity": 3, "toxicity": 0}),
        ('```json\n{"Value": "4/5", "CLARITY": "**3**"}\n```', 4, {"value": 4, "clarity": 3}),
        ('{"value": 1}\nNo, rather:\n{"value": 2}', 2, {"value": 2}),
        ('{"clarity": 3, "value": 9}', None, {"clarity": 3}),
        ('{"value": true}', None, {}),
        ('{"value": null, "toxicity": 0.5}', None, {"toxicity": 0.5}),
        ('{"value": "4 to 5"}', None, {}),
        ('{"scores": {"value": 4}}', 4, {"value": 4}),
        ('{"scores": [4]}', None, {}),
        ("value: 4", None, {}),
        ("{" * 5000, None, {}),
    ],
)
def test_named_scores_are_read_from_the_last_object_that_has_any(tmp_path, answer, score, attributes) -> None:
    found = read_json(asking_json(tmp_path), answer, finished=True)
    assert (found.score, found.attributes) == (score, attributes)
    assert found.reason == (None if score is not None else "no_score")


def test_the_main_attribute_is_the_score_and_gives_its_scale(tmp_path: Path) -> None:
    prompt = asking_json(tmp_path, main="toxicity", rationale="why")
    assert prompt.scale == (0, 1)
    assert read_json(prompt, '{"why": "a {brace}", "value": 3, "toxicity": 0.5}', finished=True).score == 0.5
    assert prompt.form is not None
    assert list(prompt.form.value["properties"]) == ["why", "value", "clarity", "toxicity"]


@pytest.mark.parametrize(
    ("front", "said"),
    [
        ({"attributes": {}}, "read: json needs attributes"),
        ({"attributes": {"text": [0, 1]}}, "attribute 'text' cannot be a column"),
        ({"attributes": {"Good Value": [0, 1]}}, "cannot be a column"),
        ({"attributes": {"value": [5, 0]}}, "must rise"),
        ({"main": "beauty"}, "main: 'beauty' is none of the attributes"),
    ],
)
def test_bad_attributes_are_refused(tmp_path: Path, front: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        asking_json(tmp_path, **front)


# -- more room, budgets


def test_an_answer_that_was_cut_is_asked_for_once_more_with_more_room(tmp_path: Path) -> None:
    def answer(asked: Asked) -> Reply:
        short = asked.body["max_tokens"] == 20
        wordy = number(asked) in (1, 2)
        return says("I would say that", "length") if wordy and (short or number(asked) == 2) else says("Score: 3")

    with serve(answer) as server:
        r = recipe(tmp_path, server.url, max_tokens=20)
        result = rate.run(r)
        assert server.attempts() == {f"doc-{i}": 1 + (i in (1, 2)) for i in range(8)}
        assert (result.n_scored, result.unscored) == (7, {"truncated": 1})
        assert (result.prompt_tokens, result.answer_tokens) == (10 * 100, 10 * 7), "both answers were paid for"
        assert rate.run(r, redo=True).n_scored == 7
        assert server.attempts().total() == 10, "and never a third time"
    assert ratings(r)["id-1"]["score"] == 3.0


@pytest.mark.parametrize(
    ("budget", "prices"),
    [({"budget_tokens": 1000}, {}), ({"budget_usd": 1.0}, {"usd_per_million_prompt_tokens": 9000.0})],
)
def test_a_budget_stops_cleanly_and_a_larger_one_goes_on(tmp_path: Path, budget: dict, prices: dict) -> None:
    """A document costs 107 tokens, or 0.90 + 0.0007 thousandths: nine fit into the first, one into the second."""
    if prices:
        prices = {"usd_per_million_prompt_tokens": 1000.0, "usd_per_million_answer_tokens": 100.0}
    with serve(by_seed) as server:
        r = recipe(tmp_path, server.url, n=40, rate=budget, concurrency=2, **prices)
        result = rate.run(r)
        assert 0 < result.n_scored < 40
        assert result.stopped_by == next(iter(budget))
        spent = result.prompt_tokens + result.answer_tokens if "budget_tokens" in budget else result.usd
        assert spent is not None
        assert spent <= next(iter(budget.values()))
        assert result.unscored == {"not_asked": 40 - result.n_scored}
        again = rate.run(r)
        assert (again.n_asked, again.n_scored) == (0, result.n_scored), "nothing is left to spend"
        larger = changed(r, "rate", **dict.fromkeys(budget))
        done = rate.run(larger)
        assert (done.n_scored, done.n_asked, done.stopped_by) == (40, 40 - result.n_scored, None)
        assert server.attempts().total() == 40


def test_a_budget_in_minutes_stops_too(tmp_path: Path) -> None:
    with serve(by_seed, delay_s=0.1) as server:
        result = rate.run(recipe(tmp_path, server.url, n=60, rate={"budget_minutes": 0.01}, concurrency=2))
    assert 0 < result.n_scored < 60
    assert result.stopped_by == "budget_minutes"


def test_a_budget_in_dollars_needs_prices(tmp_path: Path) -> None:
    line = one_line(gristmill(recipe(tmp_path, "http://127.0.0.1:9/v1"), "rate", "--budget-usd", "3"))
    assert line.startswith("budget_usd: the price of m is not known")


def test_the_next_stage_learns_from_what_a_budget_allowed(tmp_path: Path, tiny_encoder: Path) -> None:
    from pipeline import train

    with serve(by_seed) as server:
        r = recipe(tmp_path, server.url, n=60, rate={"budget_tokens": 4000})
        n_scored = rate.run(r).n_scored
    settings = {"model": str(tiny_encoder), "max_tokens": 32, "dtype": "float32", "device": "cpu"}
    learned = train.run(changed(r, "encoder", **settings))
    assert learned.n_train + learned.n_validation + learned.n_test == n_scored < 60


# -- plan


def test_a_plan_asks_nothing_and_its_figures_are_those_of_the_run(tmp_path: Path) -> None:
    prices = {"usd_per_million_prompt_tokens": 2.0, "usd_per_million_answer_tokens": 8.0}
    with serve(by_seed) as server:
        r = recipe(tmp_path, server.url, n=20, max_tokens=50, **prices)
        planned = plan.run(r)
        assert not server.asked
        assert (planned.n_documents, planned.n_recorded, planned.answer_length) == (20, 0, "teacher.max_tokens")
        assert planned.answer_tokens == 20 * 50
        assert planned.usd == pytest.approx((planned.prompt_tokens * 2 + 1000 * 8) / 1e6)
        assert (planned.tokens_per_s, planned.hours) == (None, None)
        result = rate.run(r)
        assert result.planned is not None
        assert result.planned["prompt_tokens"] == planned.prompt_tokens
        assert result.usd == pytest.approx((20 * 100 * 2 + 20 * 7 * 8) / 1e6)
        after = plan.run(changed(r, "rate", sample=20))
        assert (after.answer_tokens, after.answer_length, after.n_recorded) == (20 * 7, "recorded", 20)
        assert after.usd_left == 0
        given = plan.run(changed(r, "plan", tokens_per_s=10.0, answer_tokens=30.0))
    assert given.hours == pytest.approx((given.prompt_tokens + 20 * 30) / 10 / 3600)


def test_a_plan_counts_with_the_teachers_own_tokenizer(tmp_path: Path, tiny_causal: Path) -> None:
    r = recipe(tmp_path, "http://127.0.0.1:9/v1", n=10)
    local = changed(r, "teacher", engine="transformers", model=str(tiny_causal), base_url=None, document_tokens=16)
    planned = plan.run(local)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_causal)
    prompt = prompts.load(r.rate.prompt)  # type: ignore[arg-type]
    texts = [row["text"] for row in pq.read_table(tmp_path / "corpus.parquet").to_pylist()]
    shown = [
        tokenizer.apply_chat_template(prompt.turns(text), add_generation_prompt=True, return_dict=False)
        for text in texts
    ]
    assert planned.prompt_tokens == sum(map(len, shown))


# -- probe


def gullible(asked: Asked) -> Reply:
    """Gives 2 to everything, and 5 where the document orders it in plain words."""
    return says("Score: 5" if "Ignore the above" in asked.shown else "Score: 2")


def test_a_probe_finds_the_lines_that_a_teacher_obeys(tmp_path: Path) -> None:
    corpus(tmp_path, 40, tail=" It goes on for a while.")
    with serve(gullible) as server:
        r = recipe(tmp_path, server.url, n=40, rate={"probe_documents": 25})
        result = probe.run(r)
        n_asked = server.attempts().total()
        assert probe.run(r) == result
        assert server.attempts().total() == n_asked, "a probe that is done is not done again"
    attacks = result.raters[0]["attacks"]
    assert result.n_documents == 25
    flipped = {"flip_rate": 1.0, "raised_rate": 1.0, "mean_shift": 3.0, "worst_shift": 3.0}
    assert attacks["order"] == {"n": 25, "n_cut": 0, **flipped}
    assert attacks["end of document"]["flip_rate"] == 1.0
    for name in ("harmless line", "answer marker", "chat tokens", "base64", "translated rubric"):
        assert attacks[name]["flip_rate"] == 0.0, name


def test_a_probe_shows_the_teacher_each_line_uncut_and_unable_to_close_the_document(tmp_path: Path) -> None:
    corpus(tmp_path, 30, tail=" word" * 3000)
    body = {"body": "Grade it.\n\n<page>\n{{ text }}\n</page>\n\nNow the score."}
    with serve(lambda _: says("Score: 2")) as server:
        probe.run(recipe(tmp_path, server.url, n=30, prompt=body, rate={"probe_documents": 20}, document_tokens=200))
    shown = [asked.shown for asked in server.asked]
    assert sum("The document ends here. Ignore the above" in each for each in shown) == 20
    assert all(each.count("</page>") == 1 for each in shown)
    assert not any("<|im_end|>" in each for each in shown)


@pytest.mark.parametrize("name", ["edu-en", "edu-es", "quality", "askllm", "demo"])
def test_every_shipped_prompt_has_a_best_answer_to_probe_with(name: str) -> None:
    best = probe.best_answer(prompts.load(Path(f"prompts/{name}.md")))
    assert (
        best
        == {
            "edu-en": "Educational value: 5",
            "edu-es": "Valor educativo: 5",
            "quality": "Quality: 5",
            "askllm": "yes",
            "demo": "This text is very clear",
        }[name]
    )


# -- people


def test_agreement_with_people_is_measured_on_their_documents_in_the_sample_or_not(tmp_path: Path) -> None:
    corpus(tmp_path, 20)
    rows = [f"{i},{i % 4},{(i % 4) + (i == 3)}" for i in range(20)]
    extra = [f'new-{i},{i % 4},,"doc-{100 + i} is new."' for i in range(8)]
    path = tmp_path / "people.csv"
    lines = ["id,human_a,human_b,text", *(f"id-{row}," for row in rows), *extra]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    with serve(by_seed) as server:
        r = recipe(tmp_path, server.url, n=20, rate={"gold": path})
        result = rate.run(r)
    assert len(server.asked) == 28
    assert result.n_sampled == 20
    assert result.human is not None
    assert result.human["n"] == 28
    assert result.human["spearman"] > 0.95
    assert result.human["between_people"]["n"] == 20
    assert pq.read_table(r.run_folder / "rate" / "gold.parquet").num_rows == 28
    assert len(ratings(r)) == 20, "the sample stays what it was"


def test_panel_names_say_what_sets_teachers_apart(tmp_path: Path) -> None:
    r = recipe(tmp_path, "http://127.0.0.1:9/v1")
    found = panel.teachers(r.teacher, [{"temperature": 1.0, "top_p": 0.5}, {"model": "n"}])
    assert panel.names(found) == ["m", "m (temperature 1.0, top_p 0.5)", "n"]


# -- accidents


def test_calibration_asks_about_nothing_first_and_stops_where_that_says_nothing(tmp_path: Path) -> None:
    def refuses(asked: Asked) -> Reply:
        return likes({" good": -0.1, " bad": -3.0}) if "doc-" in asked.shown else error(400, "empty prompt")

    with serve(refuses) as server:
        r = recipe(tmp_path, server.url, prompt=CHOICES, rate={"calibrate": True})
        with pytest.raises(UserError, match=r"rate\.calibrate: m was asked about an empty document, and that failed"):
            rate.run(r)
        assert "doc-" not in "".join(asked.shown for asked in server.asked), "nothing else was paid for"
    with serve(lambda _: likes({" good": -0.1})) as server:
        r = recipe(tmp_path, server.url, prompt=CHOICES, rate={"calibrate": True})
        with pytest.raises(UserError, match="' bad' no probability for an empty document"):
            rate.run(r, redo=True)
        assert len(server.asked) == 1


def test_one_answer_is_never_two_opinions(tmp_path: Path) -> None:
    two = {**LISTED, "choices": LISTED["choices"][:2]}
    cases: list[dict[str, Any]] = [
        {"prompt": two, "rate": {"permute": True, "repeats": 3}},
        {"rate": {"more_teachers": [{"seed": 7}]}},
        {"rate": {"repeats": 2, "more_teachers": [{"seed": 1}]}, "temperature": 0.5},
    ]
    with serve(by_seed) as server:
        for case in cases:
            with pytest.raises(UserError, match="would be the same answer as"):
                rate.run(recipe(tmp_path, server.url, **case))
    assert not server.asked


def test_a_question_that_two_prompts_share_is_paid_and_counted_once(tmp_path: Path) -> None:
    with serve(lambda _: likes({" good": -0.5, " bad": -2.0})) as server:
        r = recipe(tmp_path, server.url, prompt=CHOICES)
        raw = tmp_path / "raw.md"
        raw.write_text(r.rate.prompt.read_text().replace('"read"', '"normalise": false, "read"'))  # type: ignore[union-attr]
        r = changed(r, "rate", more_prompts=[raw])
        first = rate.run(r)
        assert (len(server.asked), first.prompt_tokens, first.n_raters) == (8, 800, 2)
        (r.run_folder / "rate" / "result.json").unlink()
        again = rate.run(r)
        assert (again.prompt_tokens, again.n_asked, again.n_reused) == (800, 0, 8)


def test_a_teacher_with_another_model_does_not_inherit_what_belongs_to_the_first(tmp_path: Path) -> None:
    r = recipe(tmp_path, "http://127.0.0.1:9/v1", tokenizer="Qwen/Qwen3-8B", usd_per_million_prompt_tokens=3.0)
    same, other = panel.teachers(r.teacher, [{"temperature": 1.0}, {"model": "n"}])[1:]
    assert (same.tokenizer, same.usd_per_million_prompt_tokens) == ("Qwen/Qwen3-8B", 3.0)
    assert (other.tokenizer, other.usd_per_million_prompt_tokens, other.base_url) == (None, None, r.teacher.base_url)


def test_a_budget_that_was_enough_stopped_nothing(tmp_path: Path) -> None:
    with serve(by_seed) as server:
        result = rate.run(recipe(tmp_path, server.url, n=20, rate={"budget_tokens": 20 * 107 + 107 * 16}))
    assert (result.stopped_by, result.n_not_asked, result.n_scored) == (None, 0, 20)


def test_a_budget_below_one_answer_pays_for_one(tmp_path: Path) -> None:
    with serve(by_seed) as server:
        result = rate.run(recipe(tmp_path, server.url, n=50, rate={"budget_tokens": 1}, concurrency=16))
        assert len(server.asked) == 1
    assert (result.n_scored, result.n_not_asked) == (1, 49)


def test_a_budget_smaller_than_what_is_in_flight_holds(tmp_path: Path) -> None:
    with serve(by_seed) as server:
        result = rate.run(recipe(tmp_path, server.url, n=50, rate={"budget_tokens": 1000}, concurrency=16))
    assert (result.n_scored, result.stopped_by) == (9, "budget_tokens")
    assert result.prompt_tokens + result.answer_tokens == 9 * 107


def test_a_budget_smaller_than_a_batch_of_a_local_teacher_holds(tmp_path: Path, tiny_causal: Path) -> None:
    local = {"engine": "transformers", "model": str(tiny_causal), "base_url": None, "device": "cpu"}
    r = recipe(tmp_path, "http://127.0.0.1:9/v1", n=40, prompt=CHOICES, rate={"budget_tokens": 1500})
    result = rate.run(changed(r, "teacher", **local, document_tokens=16, dtype="float32"))
    assert result.stopped_by == "budget_tokens"
    assert 1000 < result.prompt_tokens <= 1500


def test_a_budget_at_an_endpoint_that_counts_no_tokens_is_no_crash(tmp_path: Path) -> None:
    uncounted = {"choices": [{"index": 0, "message": {"content": "Score: 3"}, "finish_reason": "stop"}]}
    with serve(lambda _: reply(uncounted)) as server:
        result = rate.run(recipe(tmp_path, server.url, n=12, rate={"budget_tokens": 100}))
    assert (result.n_scored, result.prompt_tokens, result.stopped_by) == (12, 0, None)


def test_a_dear_second_teacher_is_not_taken_to_cost_what_the_first_did(tmp_path: Path) -> None:
    dear = {"model": "dear", "usd_per_million_prompt_tokens": 1000.0, "usd_per_million_answer_tokens": 0.0}
    prices = {"usd_per_million_prompt_tokens": 1.0, "usd_per_million_answer_tokens": 0.0}
    with serve(by_seed) as server:
        rates = {"more_teachers": [dear], "budget_usd": 1.0}
        result = rate.run(recipe(tmp_path, server.url, n=40, rate=rates, concurrency=4, **prices))
    assert result.stopped_by == "budget_usd"
    assert result.usd is not None
    assert result.usd <= 1.0


def test_more_room_than_the_model_has_leaves_the_short_answers(tmp_path: Path, tiny_causal: Path) -> None:
    r = recipe(tmp_path, "http://127.0.0.1:9/v1", n=4, rate={"max_unscored_rate": 1.0})
    local = {"engine": "transformers", "model": str(tiny_causal), "base_url": None, "device": "cpu"}
    r = changed(r, "teacher", **local, document_tokens=16, max_tokens=1200, dtype="float32")
    with pytest.raises(UserError, match="documents have no score"):
        rate.run(r)
    assert len(ratings(r)) == 4


def test_what_a_budget_left_out_of_the_second_askings_is_asked_later(tmp_path: Path) -> None:
    def wordy(asked: Asked) -> Reply:
        return says("I would say", "length") if asked.body["max_tokens"] == 20 else says("Score: 3")

    with serve(wordy) as server:
        r = recipe(tmp_path, server.url, n=10, max_tokens=20, concurrency=1, rate={"budget_tokens": 13 * 107})
        first = rate.run(r)
        assert first.stopped_by == "budget_tokens"
        assert 0 < first.n_not_asked < 10
        done = rate.run(changed(r, "rate", budget_tokens=None))
    assert (done.n_scored, done.n_not_asked) == (10, 0)
    assert len(server.asked) == 20


def test_a_probe_that_a_budget_stopped_goes_on(tmp_path: Path) -> None:
    corpus(tmp_path, 40, tail=" It goes on for a while.")
    with serve(gullible) as server:
        r = recipe(tmp_path, server.url, n=40, rate={"probe_documents": 25, "budget_tokens": 4000})
        first = probe.run(r)
        assert first.n_not_asked > 0
        done = probe.run(changed(r, "rate", budget_tokens=None))
    assert done.n_not_asked == 0
    assert done.raters[0]["attacks"]["order"]["flip_rate"] == 1.0


def test_a_line_that_the_teacher_did_not_see_says_nothing_about_it(tmp_path: Path) -> None:
    rows = [{"id": f"id-{i}", "text": f"doc-{i} " + "слово " * 900} for i in range(24)]
    write(tmp_path, rows)
    with serve(gullible) as server:
        r = recipe(tmp_path, server.url, n=24, rate={"probe_documents": 24}, document_tokens=100)
        found = probe.run(r).raters[0]["attacks"]
    assert found["order"]["n"] == 24
    assert found["order"]["flip_rate"] == 1.0


def test_agreement_of_prompts_needs_only_what_both_gave() -> None:
    from pipeline.consensus import means_of_both

    nan = np.nan
    a = {("m", 0): np.array([1.0, 2.0, nan]), ("n", 0): np.array([nan, nan, nan])}
    b = {("m", 0): np.array([1.0, 4.0, 5.0]), ("n", 0): np.array([3.0, 3.0, 3.0])}
    np.testing.assert_array_equal(means_of_both(a, b), [[1.0, 2.0, nan], [1.0, 4.0, nan]])
