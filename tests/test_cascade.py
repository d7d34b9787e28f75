"""A cheap first student rules documents out before the encoder reads them."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from scipy.stats import beta, binom
from test_score import make_student, other_student, recipe, write_shards

from pipeline import cascade, cascade_sample, config, cuts, score, summary, windows
from pipeline import filter as filter_
from pipeline.encoder import Encoder
from pipeline.errors import UserError
from pipeline.windows import Windows
from pipeline.workers import Effort

NUMBERS = np.random.default_rng(0)
LEAST_GAIN = cascade.LEAST_GAIN

# -- the bound --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recall", [0.9, 0.95, 0.99])
@pytest.mark.parametrize("n", [30, 299, 1000])
def test_one_more_miss_would_break_the_bound(n: int, recall: float):
    """By the binomial distribution itself: at a recall that just fails, so few misses would be rarer than 5%."""
    most = cascade.most_missed(n, recall)
    assert most < 0 or binom.cdf(most, n, 1 - recall) <= 0.05
    assert binom.cdf(most + 1, n, 1 - recall) > 0.05
    if most >= 0:
        assert beta.ppf(0.05, n - most, most + 1) >= recall


@pytest.mark.parametrize("recall", [0.5, 0.95, 0.99])
def test_the_fewest_documents_are_just_enough(recall: float):
    fewest = cascade.fewest(recall)
    assert cascade.most_missed(fewest, recall) == 0 and cascade.most_missed(fewest - 1, recall) == -1


@pytest.mark.parametrize(("n", "recall", "noise"), [(60, 0.95, 1.0), (400, 0.99, 0.5), (300, 0.9, 3.0)])
def test_the_recall_is_as_promised_in_nineteen_of_twenty_samples(n: int, recall: float, noise: float):
    """What the threshold lets pass of a large population, over 1,000 calibration samples of n best documents."""
    best = np.sort(NUMBERS.normal(size=200_000) * noise)
    kept = 0
    for _ in range(1000):
        said = NUMBERS.choice(best, n, replace=False)
        threshold = cascade.calibrate(said, np.ones(n), 0.5, recall)
        kept += 1 - np.searchsorted(best, threshold) / len(best) >= recall
    assert kept >= binom.ppf(0.001, 1000, 0.95)


@pytest.mark.parametrize("recall", [0.9, 0.99])
def test_no_more_of_the_best_are_missed_than_allowed_and_a_higher_threshold_would_miss_more(recall: float):
    scores = NUMBERS.normal(size=5000)
    said = np.round(scores + NUMBERS.normal(size=5000), 1)  # with ties
    cut = np.quantile(scores, 0.8)
    threshold = cascade.calibrate(said, scores, cut, recall)
    best = said[scores >= cut]
    allowed = cascade.most_missed(len(best), recall)
    assert (best < threshold).sum() <= allowed
    next_higher = np.unique(said)[np.searchsorted(np.unique(said), threshold) + 1]
    assert (best < next_higher).sum() > allowed
    assert not (said == threshold).any(), "rounding decides about no document of the sample"


def test_nothing_is_ruled_out_where_the_best_are_said_to_be_the_worst():
    said = np.arange(100.0)
    assert cascade.calibrate(said, -said, -29.0, 0.9) == -math.inf
    assert cascade.calibrate(said, said, 80.0, 0.9) == -math.inf, "20 documents are too few"


# -- the first student ------------------------------------------------------------------------------------------------


def test_it_sees_the_mean_of_the_word_embeddings_and_the_number_of_tokens():
    table = torch.tensor([[1.0, 2.0], [3.0, 6.0], [10.0, 0.0]])
    ids = [np.array([0, 1, 1], np.int32), np.array([2], np.int32)]
    expected = [[7 / 3, 14 / 3, math.log(4)], [10, 0, math.log(2)]]
    found = cascade.features(ids, table)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_allclose(cascade.n_tokens(found), [3, 1])


def test_it_learns_what_is_not_linear_and_the_same_from_the_same_seed():
    features = NUMBERS.normal(size=(900, 3)) * [1, 100, 0] + [0, 1000, 7]
    truth = np.sin(features[:, 0]) + (features[:, 1] / 100 - 10) ** 2
    first = cascade.learn(features[:600], truth[:600], 3)
    error = ((first.scores(features[600:]) - truth[600:]) ** 2).mean()
    assert error < 0.1 * truth[600:].var()
    assert cascade.learn(features[:600], truth[:600], 3).digest == first.digest
    assert cascade.learn(features[:599], truth[:599], 3).digest != first.digest
    assert first._replace(threshold=1.0).digest != first.digest


def test_it_is_kept_to_the_bit_and_a_damaged_file_is_none(tmp_path: Path):
    first = cascade.learn(NUMBERS.normal(size=(20, 3)), NUMBERS.normal(size=20), 0)._replace(threshold=0.1)
    path = tmp_path / "cascade.safetensors"
    assert cascade.load(path) is None
    cascade.save(first, {"cut": 1.5}, path)
    kept, about = cascade.load(path) or pytest.fail()
    assert kept.digest == first.digest and about == {"cut": 1.5}
    path.write_bytes(path.read_bytes()[:-9])
    assert cascade.load(path) is None


def test_the_speed_up_counts_what_is_done_either_way():
    assert cascade.speed_up(0.5, cascade.Costs(0.0, 0.0, 8.0)) == 2
    assert cascade.speed_up(0.5, cascade.Costs(2.0, 0.0, 8.0)) == 10 / 6
    assert cascade.speed_up(1.0, cascade.Costs(2.0, 1.0, 8.0)) < 1


def test_what_is_ruled_out_saves_as_much_as_it_has_tokens(tmp_path: Path):
    """The best have ten times the tokens of the others."""
    scores = NUMBERS.normal(size=1000)
    features = np.column_stack([scores, np.log1p(np.where(scores > 0.5, 500, 50))])
    records = np.zeros(1000, [("outputs", "<f4", (1,)), ("n_windows", "<i4")])
    records["outputs"][:, 0], records["n_windows"] = scores, 1
    work = SimpleNamespace(effort=Effort(), unit_texts=64)
    work.effort.seconds["computing"] = 1e6
    found = cascade_sample.calibrated(recipe(tmp_path, tmp_path, tmp_path, **FEW), features, records, work).about
    assert 0.2 < found["passing_share"] < 0.35 < 0.5 < found["passing_token_share"] < 0.9
    assert found["speed_up"] == pytest.approx(1 / found["passing_token_share"], rel=1e-3)


def test_a_cascade_that_saves_too_little_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cascade, "LEAST_GAIN", LEAST_GAIN)
    cascade.check_gain(1.2, 0.8)
    with pytest.raises(UserError, match=r"would let 90% of the tokens pass, which makes scoring 1.10 times as fast,"):
        cascade.check_gain(1.1, 0.9)


# -- the stage --------------------------------------------------------------------------------------------------------

FEW = {"cascade_keep_share": 0.3, "cascade_recall": 0.9, "cascade_sample": 200}
"""29 of the best are enough for this recall."""


@pytest.fixture(autouse=True)
def worth_it(monkeypatch: pytest.MonkeyPatch):
    """On models this small nothing is saved."""
    monkeypatch.setattr(cascade, "LEAST_GAIN", 0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, texts: list[str], tiny_encoder: Path) -> Path:
    """A student and 900 documents in three shards, 200 of them twice and some empty."""
    made = tmp_path_factory.mktemp("cascade")
    numbers = np.random.default_rng(5)
    begins, lengths = numbers.integers(0, 500, 700), numbers.integers(60, 700, 700)
    given = [texts[i % len(texts)][b : b + n] for i, (b, n) in enumerate(zip(begins, lengths, strict=True))]
    write_shards(made / "corpus", [[*given[:300], ""], [*given[300:600], None, *given[200:300]], given[500:]])
    make_student(made / "student", tiny_encoder)
    return made


def rows(recipe: config.Recipe, side: str = "score/scored") -> list[dict]:
    paths = sorted((recipe.run_folder / side).glob("*.parquet"))
    return [row for path in paths for row in pq.read_table(path).to_pylist()]


@pytest.fixture
def behind(tmp_path: Path, folder: Path) -> config.Recipe:
    return recipe(tmp_path, folder / "corpus", folder / "student", id_column="id", **FEW)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> list[dict]:
    """What a run without a cascade gives."""
    found = recipe(tmp_path_factory.mktemp("alone"), folder / "corpus", folder / "student", id_column="id")
    score.run(found)
    return rows(found)


@pytest.fixture
def read_texts(monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], list[int]]:
    """Texts that are tokenised, and windows that are computed, from now on."""
    tokenised: list[str] = []
    computed: list[int] = []
    read, vectors = Encoder.read, Encoder.vectors
    monkeypatch.setattr(Encoder, "read", lambda self, texts: tokenised.extend(texts) or read(self, texts))
    monkeypatch.setattr(Encoder, "vectors", lambda self, of: computed.append(len(of.ids)) or vectors(self, of))
    return tokenised, computed


@pytest.mark.parametrize("sidecar", [False, True])
def test_a_ruled_out_document_has_a_reason_and_every_other_the_score_it_has_without(
    behind: config.Recipe, alone: list[dict], sidecar: bool
):
    settings = behind.score.model_copy(update={"sidecar": sidecar})
    result = score.run(behind.model_copy(update={"score": settings}))
    found = rows(behind)
    assert list(found[0]) == ["id", *["text"] * (not sidecar), "score", "int_score", "score_reason"]
    for row, expected in zip(found, alone, strict=True):
        assert row["id"] == expected["id"]
        if not (expected["text"] or "").strip():
            assert (row["score"], row["int_score"], row["score_reason"]) == (None, None, "no_text")
        elif row["score_reason"] == "cascade":
            assert (row["score"], row["int_score"]) == (None, None)
        else:
            assert [row[name] for name in ("score", "int_score", "score_reason")] == [
                *(expected[name] for name in ("score", "int_score")),
                None,
            ]
    reasons = [row["score_reason"] for row in found]
    assert result.n_ruled_out == reasons.count("cascade") > 0 and result.n_empty == 2
    assert result.n_scored == reasons.count(None) == sum(result.int_score_counts.values()) == result.n_windows


def test_the_result_says_what_was_promised_and_the_sample_keeps_it(behind: config.Recipe, alone: list[dict]):
    result = score.run(behind)
    about = result.cascade or pytest.fail()
    assert (about["keep_share"], about["recall"], about["n_learned"], about["n_calibrated"]) == (0.3, 0.9, 50, 150)
    assert 29 <= about["n_above"] <= 75 and about["n_missed"] <= cascade.most_missed(about["n_above"], 0.9)
    assert 0 < about["passing_share"] < 1 and about["speed_up"] > 0
    assert 0 < about["passing_token_share"] < 1
    best = [row["id"] for row in alone if row["score"] is not None and row["score"] >= about["cut"]]
    scored = {row["id"] for row in rows(behind) if row["score"] is not None}
    assert len(scored.intersection(best)) / len(best) >= 0.85
    told = summary.tell_score(result.model_dump())
    assert (
        f"cascade: {result.n_ruled_out / result.n_rows:.0%} ruled out before the encoder; recall at least 0.9" in told
    )


def test_no_text_is_tokenised_twice_and_what_is_ruled_out_is_never_computed(
    behind: config.Recipe, alone: list[dict], read_texts: tuple[list[str], list[int]]
):
    tokenised, computed = read_texts
    result = score.run(behind)
    different = {row["text"] for row in alone if (row["text"] or "").strip()}
    assert sorted(tokenised) == sorted(different)
    passing = {row["text"] for row in rows(behind) if row["score"] is not None}
    assert len(passing) < sum(computed) < len(passing) + 200 < len(different) + 100
    assert result.n_duplicates == len(alone) - result.n_empty - len(different)


@pytest.mark.parametrize("engine", ["packed", "plain"])
def test_a_resumed_run_writes_the_bytes_of_a_whole_one_by_the_same_first_student(
    tmp_path: Path, folder: Path, tiny_encoder: Path, engine: str, monkeypatch: pytest.MonkeyPatch
):
    """Though the sample, whose scores were known then, is not scored again."""
    made = make_student(tmp_path / "student", tiny_encoder, engine=engine)
    found = recipe(tmp_path, folder / "corpus", made, keep_embeddings=True, **FEW)
    first = score.run(found)
    out = tmp_path / "run" / "score"
    whole = {path: path.read_bytes() for path in [*out.glob("*/*.parquet"), out / cascade_sample.FILE]}
    (out / "scored" / "part-1.parquet").unlink()
    (out / "embeddings" / "part-2.parquet").unlink()
    monkeypatch.setattr(cascade_sample, "make", lambda *_: pytest.fail("it is there"))
    again = score.run(found)
    assert {path: path.read_bytes() for path in whole} == whole
    same = ("n_scored", "n_ruled_out", "n_windows", "n_truncated", "cascade", "int_score_counts")
    assert [getattr(again, name) for name in same] == [getattr(first, name) for name in same]
    assert again.n_shards_reused == 1


def test_two_runs_rule_out_the_same_and_another_seed_learns_from_another_sample(tmp_path: Path, folder: Path):
    made = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        found = recipe(tmp_path / name, folder / "corpus", folder / "student", **FEW)
        score.run(found.model_copy(update={"seed": seed}))
        made.append([path.read_bytes() for path in sorted((tmp_path / name).glob("run/score/scored/*"))])
    assert made[0] == made[1] != made[2]


def test_a_changed_corpus_gets_a_first_student_of_its_own(tmp_path: Path, folder: Path):
    source = Path(shutil.copytree(folder / "corpus", tmp_path / "corpus"))
    found = recipe(tmp_path, source, folder / "student", **FEW)
    score.run(found)
    before = (tmp_path / "run/score/cascade.safetensors").read_bytes()
    (source / "part-2.parquet").unlink()
    result = score.run(found, redo=True)
    assert (result.n_shards, result.n_shards_reused) == (2, 0)
    assert (tmp_path / "run/score/cascade.safetensors").read_bytes() != before
    without = recipe(tmp_path, source, folder / "student")
    result = score.run(without, redo=True)
    assert (result.n_ruled_out, result.cascade) == (0, None)
    assert not (tmp_path / "run/score/cascade.safetensors").exists()
    assert "score_reason" not in pq.read_schema(tmp_path / "run/score/scored/part-0.parquet").names


def test_the_sample_is_none_that_was_drawn_to_be_rated(behind: config.Recipe):
    from pipeline.sample import sample

    rated = {document.text for document in sample(behind.corpus, 200, behind.seed)[0]}
    assert len(rated.intersection(cascade_sample.draw(behind))) < 100


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"cascade_recall": 0.99},
            r"score.cascade_sample: 200 documents hold \d+ of the best .* takes 299: set it to",
        ),
        ({"cascade_sample": 5000}, r"all \d+ different texts of the corpus are in a sample of 5000, so there is"),
        ({"more_students": ["da={folder}/other"]}, r"but the students give score, score_da, topic_da; leave it out"),
        ({"student": "{folder}/other"}, r"but the students give score, topic; leave it out"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(
    tmp_path: Path, folder: Path, tiny_encoder: Path, settings: dict, message: str
):
    other_student(tmp_path / "other", tiny_encoder)
    given = json.loads(json.dumps(settings).replace("{folder}", str(tmp_path)))
    with pytest.raises(UserError, match=message):
        score.run(recipe(tmp_path, folder / "corpus", given.pop("student", folder / "student"), **{**FEW, **given}))
    assert not list((tmp_path / "run").glob("score/scored/*"))


def test_a_cascade_that_does_not_pay_stops_before_anything_is_written(
    behind: config.Recipe, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(cascade, "LEAST_GAIN", 99.0)
    for _ in range(2):
        with pytest.raises(
            UserError, match=r"student would let \d+% of the tokens pass, which makes scoring .* leave it"
        ):
            score.run(behind)
    assert not list((behind.run_folder / "score").glob("*/*.parquet"))
    score.run(behind.model_copy(update={"score": config.Score(student=behind.score.student)}))


def with_filter(recipe: config.Recipe, **settings: object) -> config.Recipe:
    return recipe.model_copy(update={"filter": config.Filter.model_validate(settings)})


REFUSED = [
    ({"keep_share": 0.4}, r"filter.keep_share: 0.4 is more than score.cascade_keep_share, 0.3"),
    ({"keep_share": 0.1, "per_group": "id"}, r"filter.per_group chooses among all documents"),
    ({"keep_share": 0.1, "sampling": "gumbel"}, r"filter.sampling: gumbel chooses among all documents"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_a_filter_that_needs_what_is_ruled_out_is_refused_before_scoring(
    behind: config.Recipe, settings: dict, message: str
):
    with pytest.raises(UserError, match=message):
        score.run(with_filter(behind, **settings))


# -- the filter -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sidecar", [False, True])
def test_the_filter_counts_the_reason_and_its_share_is_of_all_documents(
    behind: config.Recipe, alone: list[dict], sidecar: bool
):
    behind = behind.model_copy(update={"score": behind.score.model_copy(update={"sidecar": sidecar})})
    scored = score.run(behind)
    result = filter_.run(with_filter(behind, keep_share=0.2, keep_dropped=True))
    assert result.dropped["ruled_out_by_cascade"] == scored.n_ruled_out and result.dropped["no_text"] == 2
    assert result.n_kept == pytest.approx(0.2 * (result.n_rows - 2), abs=2) and result.quality is None
    kept = {row["id"] for row in rows(behind, "filter/kept")}
    expected = sorted((row for row in alone if row["score"] is not None), key=lambda row: -row["score"])[: len(kept)]
    assert len(kept.intersection(row["id"] for row in expected)) / len(kept) > 0.85
    dropped = [row["dropped_reason"] for row in rows(behind, "filter/dropped")]
    assert dropped.count("ruled_out_by_cascade") == scored.n_ruled_out


def test_the_filter_refuses_what_a_cascade_has_ruled_out(behind: config.Recipe):
    about = score.run(behind).cascade or pytest.fail()
    below = [
        *REFUSED,
        ({"min_score": about["cut"] - 0.5}, r"would be kept, but below .* a cascade has ruled many out"),
    ]
    below += [({"min_int_score": 0}, r"ruled many out"), ({"keep_tokens": 10**9}, r"ruled many out")]
    below += [({"keep_documents": 500}, r"ruled many out \(score.cascade_keep_share: 0.3\); keep fewer")]
    for settings, message in below:
        with pytest.raises(UserError, match=message):
            filter_.run(with_filter(behind, **settings))
        assert not (behind.run_folder / "filter" / "kept").exists()
    for settings in ({"min_score": about["cut"]}, {"keep_documents": 100}, {"keep_tokens": 1000}):
        result = filter_.run(with_filter(behind, **settings), redo=True)
        assert result.n_kept > 0


def test_the_plan_says_that_its_figures_are_of_what_was_let_pass(
    behind: config.Recipe, caplog: pytest.LogCaptureFixture
):
    scored = score.run(behind)
    result = cuts.run(behind)
    assert result.n_scored == scored.n_scored and result.n_rows == scored.n_rows
    assert "plan: a cascade ruled documents out; all figures are of those that it let pass" in caplog.text


# -- what it is made of -----------------------------------------------------------------------------------------------


def test_the_windows_of_some_texts_are_those_of_these_texts_alone():
    ids = [np.array([i], np.int32) for i in range(6)]
    read = Windows(ids, np.array([0, 0, 1, 2, 2, 2]), np.array([True, False, True]))
    assert [int(row[0]) for row in read.firsts] == [0, 2, 3]
    found = windows.of_texts(read, np.array([True, False, True]))
    assert [int(row[0]) for row in found.ids] == [0, 1, 3, 4, 5]
    assert found.owners.tolist() == [0, 0, 1, 1, 1] and found.truncated.tolist() == [True, True]
    none = windows.of_texts(read, np.zeros(3, bool))
    assert (none.ids, none.owners.tolist(), none.truncated.tolist()) == ([], [], [])


def test_any_encoder_with_a_table_of_words_will_do(tiny_encoder: Path):
    encoder = Encoder(config.Encoder(model=str(tiny_encoder), max_tokens=64, dtype="bfloat16", device="cpu"))
    table = encoder.word_embeddings
    assert table.dtype is torch.float32 and table.shape == (len(encoder.tokenizer), 32)
    [ids] = encoder.read(["one text"]).firsts
    mean = table[torch.from_numpy(ids).long()].mean(0).numpy()
    np.testing.assert_allclose(cascade.features([ids], table)[0, :-1], mean, atol=1e-6)
