"""rate --next: which documents are chosen, and that a round is rated like the sample."""

import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import stamina
from endpoint import Asked, Endpoint, Reply, changed, gristmill, one_line, ratings, recipe, says, serve, write
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline import panel, rate, rounds, train
from pipeline.config import Recipe
from pipeline.errors import UserError
from pipeline.rounds import choose, turns
from pipeline.tracking import read_json

# -- choosing


def random(n: int, dim: int, seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(n, dim)).astype(np.float32)


@given(st.lists(st.integers(0, 5), max_size=40), st.integers(0, 60))
def test_strata_get_equal_shares_and_rare_ones_all_they_have(strata: list[int], n: int) -> None:
    found, there = Counter(turns(np.array(strata, int), n)), Counter(strata)
    assert found.total() == min(n, len(strata))
    assert all(found[value] <= there[value] for value in found)
    most = max(found.values(), default=0)
    assert all(found[value] in (there[value], most, most - 1) for value in there)


def test_no_document_is_chosen_twice_and_all_are_if_asked() -> None:
    strata = np.arange(30) % 4
    found = choose(random(30, 5, 0), strata, random(10, 5, 1), 50)
    assert sorted(found.places.tolist()) == list(range(30))
    assert len(choose(random(30, 5, 0), strata, random(10, 5, 1), 7).places) == 7


def test_the_uncertainty_is_the_leverage_over_what_is_rated_and_chosen() -> None:
    pool, known = random(40, 6, 0).astype(float), random(15, 6, 1).astype(float)
    found = choose(pool, np.zeros(40, int), known, 5)
    middle = known.mean(axis=0)
    ridge = rounds.PRIOR * float(((known - middle) ** 2).sum(axis=1).mean())
    rows = np.hstack([known - middle, np.ones((15, 1))])
    for place, said in zip(found.places, found.uncertainty, strict=True):
        inverse = np.linalg.inv(rows.T @ rows + ridge * np.eye(7))
        candidates = np.hstack([pool - middle, np.ones((40, 1))])
        exact = np.einsum("ij,jk,ik->i", candidates, inverse, candidates)
        assert said == pytest.approx(exact[place], rel=1e-5)
        rows = np.vstack([rows, candidates[place]])


def test_documents_like_those_that_are_rated_or_chosen_wait() -> None:
    far, other = np.array([5.0, 0, 0, 0]), np.array([0, 5.0, 0, 0])
    known = random(50, 4, 0) * [0.1, 0.1, 1, 1]
    pool = np.vstack([known[0], far, far + 1e-3, other, known[1:6]])
    found = choose(pool.astype(np.float32), np.zeros(9, int), known.astype(np.float32), 2)
    assert sorted(max(place, 2) for place in found.places.tolist()) == [2, 3]


def test_only_some_candidates_are_looked_at_so_that_oddities_do_not_take_all_places() -> None:
    pool = random(100, 4, 0)
    pool[40:] *= 1000
    found = choose(pool, np.zeros(100, int), random(20, 4, 1), 20)
    assert max(found.places.tolist()) < 20 * rounds.TRIED


def test_rated_documents_that_are_all_alike_are_no_crash() -> None:
    found = choose(random(5, 3, 0), np.zeros(5, int), np.ones((4, 3), np.float32), 3)
    assert len(set(found.places.tolist())) == 3
    assert np.isfinite(found.uncertainty).all()


# -- rounds of a run

TOPICS = ("photosynthesis turns light into sugar", "buy cheap pills at once", "the court found for the plaintiff")


def text(i: int) -> str:
    return f"doc-{i} says that {TOPICS[worth(i) // 2]}, and {i} times again."


def worth(i: int) -> int:
    """One document in fifteen is worth 4, one in three 2, the others 0."""
    return 4 if i % 15 == 7 else 2 * (i % 3 == 0)


def teacher(asked: Asked) -> Reply:
    return says(f"Score: {worth(int(asked.document.removeprefix('doc-')))}")


@pytest.fixture(scope="module")
def server() -> Iterator[Endpoint]:
    with stamina.set_testing(True, attempts=100, cap=True), serve(teacher) as found:
        yield found


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, server: Endpoint, tiny_encoder: Path) -> Recipe:
    """A run with sixty of 240 documents rated, and a student."""
    folder = tmp_path_factory.mktemp("rounds")
    write(folder, [{"id": f"id-{i}", "text": text(i), "site": f"site-{i // 4}", "known": i % 2} for i in range(240)])
    r = recipe(
        folder,
        server.url,
        n=60,
        prompt={"body": "Rate this.\n\n{{ text }}"},
        rate={"group_column": "site", "gold_column": "known", "pool": 150},
        concurrency=32,
    )
    encoder = {"model": str(tiny_encoder), "max_tokens": 32, "dtype": "float32", "device": "cpu"}
    r = Recipe.model_validate(r.model_dump() | {"encoder": encoder, "train": {"learning_curve": False}})
    rate.run(r)
    train.run(r)
    return r


@pytest.fixture
def fresh(trained: Recipe, tmp_path: Path) -> Recipe:
    """A copy of that run."""
    shutil.copytree(trained.run_folder, tmp_path / "run")
    return trained.model_copy(update={"run_folder": tmp_path / "run"})


def add(r: Recipe, n: int, redo: bool = False) -> None:
    """rate --next, but for the rating."""
    rounds.add(r, n, rate.inputs(r, panel.of(r)), redo)


def test_next_with_other_settings_chooses_nothing(fresh: Recipe) -> None:
    with pytest.raises(UserError, match=r"rate.sample changed from 60 to 61 .*--redo"):
        add(changed(fresh, "rate", sample=61), 5)
    assert rounds.files(fresh.run_folder / "rate") == []
    add(changed(fresh, "rate", pool=30), 5)
    assert rate.run(fresh).rounds[1]["n_documents"] == 5


def asked_in(server: Endpoint, before: int) -> list[str]:
    """Documents asked about since."""
    return [asked.document for asked in server.asked[before:]]


def test_a_round_is_chosen_from_what_is_not_rated_and_rated_like_the_sample(fresh: Recipe, server: Endpoint) -> None:
    sampled, before = set(ratings(fresh)), len(server.asked)
    add(fresh, 20)
    table = pq.read_table(fresh.run_folder / "rate" / "rounds" / "1.parquet")
    chosen = table.to_pylist()
    assert len(server.asked) == before, "nothing is asked while choosing"
    assert len({row["id"] for row in chosen}) == 20
    assert not {row["id"] for row in chosen} & sampled
    assert sum({row["stratum"]: row["pool_share"] for row in chosen}.values()) <= 1 + 1e-9
    result = rate.run(fresh)
    assert sorted(asked_in(server, before)) == sorted(f"doc-{row['id'].removeprefix('id-')}" for row in chosen)
    rows = ratings(fresh)
    assert {id for id, row in rows.items() if row["round"] == 1} == {row["id"] for row in chosen}
    assert {id for id, row in rows.items() if row["round"] == 0} == sampled
    for id, row in rows.items():
        i = int(id.removeprefix("id-"))
        assert (row["score"], row["group"], row["gold"]) == (worth(i), f"site-{i // 4}", i % 2)
    assert (result.n_sampled, result.n_scored, result.n_not_drawn) == (80, 80, 160)
    assert [(each["round"], each["n_documents"]) for each in result.rounds] == [(0, 60), (1, 20)]


def test_figures_about_the_corpus_are_of_the_sample_alone(fresh: Recipe) -> None:
    before = rate.run(fresh)
    add(fresh, 20)
    result = rate.run(fresh)
    assert (result.mean_score, result.int_score_counts) == (before.mean_score, before.int_score_counts)
    assert (result.gold or {})["auc"] == (before.gold or {})["auc"]
    assert sum(result.int_score_counts.values()) == 60
    assert sum(result.rounds[1]["int_score_counts"].values()) == 20


def test_rating_again_without_next_is_done_already(fresh: Recipe, server: Endpoint) -> None:
    add(fresh, 10)
    first, before = rate.run(fresh), len(server.asked)
    assert rate.run(fresh).model_dump_json() == first.model_dump_json()
    assert rate.run(fresh, redo=True).seconds == first.seconds
    (fresh.run_folder / "rate" / "result.json").unlink()
    again = rate.run(fresh)
    assert (len(server.asked), again.n_asked, again.n_reused) == (before, 0, 70)


def test_a_second_next_makes_a_second_round(fresh: Recipe) -> None:
    for number in (1, 2):
        add(fresh, 15)
        assert [each["n_documents"] for each in rate.run(fresh).rounds] == [60] + [15] * number
    assert Counter(row["round"] for row in ratings(fresh).values()) == {0: 60, 1: 15, 2: 15}


def test_a_round_that_is_not_rated_to_its_end_goes_on_and_no_other_is_chosen(
    fresh: Recipe, server: Endpoint, caplog: pytest.LogCaptureFixture
) -> None:
    before = len(server.asked)
    add(fresh, 20)
    stopped = rate.run(changed(changed(fresh, "rate", budget_tokens=107 * 70), "teacher", concurrency=1))
    assert stopped.n_not_asked > 0
    add(fresh, 20)
    assert "not rated to its end" in caplog.text
    result = rate.run(fresh)
    assert [each["n_documents"] for each in result.rounds] == [60, 20]
    assert len(set(asked_in(server, before))) == len(asked_in(server, before)) == 20


def test_a_round_that_was_chosen_but_never_asked_about_is_rated_by_rate(fresh: Recipe) -> None:
    add(fresh, 20)
    (fresh.run_folder / "rate" / "result.json").unlink()
    add(fresh, 20)
    assert [each["n_documents"] for each in rate.run(fresh).rounds] == [60, 20]


def test_a_larger_sample_takes_documents_out_of_a_round_and_asks_only_about_new_ones(
    fresh: Recipe, server: Endpoint
) -> None:
    add(fresh, 20)
    rate.run(fresh)
    before = len(server.asked)
    result = rate.run(changed(fresh, "rate", sample=240), redo=True)
    assert [each["n_documents"] for each in result.rounds] == [240, 0]
    assert len(asked_in(server, before)) == 160


def test_with_everything_rated_there_is_nothing_to_choose(fresh: Recipe) -> None:
    add(changed(fresh, "rate", pool=1000), 500)
    assert [each["n_documents"] for each in rate.run(fresh).rounds] == [60, 180]
    with pytest.raises(UserError, match=r"rate --next: every document of .* is rated already"):
        add(fresh, 1)


def test_a_round_of_another_corpus_is_refused(fresh: Recipe, tmp_path: Path) -> None:
    add(fresh, 5)
    other = write(tmp_path, [{"id": f"id-{i}", "text": text(i), "site": "a", "known": 0} for i in range(300)])
    with pytest.raises(UserError, match=r"rounds/1\.parquet was chosen from another corpus than"):
        rate.run(changed(fresh, "corpus", path=str(other)), redo=True)


def test_next_needs_a_student(tmp_path: Path, server: Endpoint) -> None:
    r = recipe(tmp_path, server.url)
    rate.run(r)
    assert "train is not finished; run gristmill train first" in one_line(gristmill(r, "rate", "--next", "5"))
    assert not (r.run_folder / "rate" / "rounds").exists()
    assert rate.run(r).n_sampled == 8


def test_the_command_chooses_and_rates(fresh: Recipe) -> None:
    done = gristmill(fresh, "rate", "--next", "12", "--json", HF_HUB_OFFLINE="1")
    assert done.code == 0, done.stderr
    assert (read_json(fresh.run_folder / "rate" / "result.json") or {})["rounds"][1]["n_documents"] == 12


def test_the_same_choice_is_made_again(fresh: Recipe) -> None:
    path = fresh.run_folder / "rate" / "rounds" / "1.parquet"
    add(fresh, 20)
    first = pq.read_table(path)
    path.unlink()
    add(fresh, 20)
    assert pq.read_table(path).equals(first)


def test_next_without_a_rated_sample_asks_nothing(server: Endpoint, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no rated sample; run gristmill rate first"):
        add(recipe(tmp_path, server.url), 5)
