"""The proof's parts: which documents an arm has, what counts as a copy, and when a difference is one."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import arms, contrast, corpus, filter, proof, scratch
from pipeline.config import Prove, Recipe
from pipeline.errors import UserError
from pipeline.sample import priority


def filtered(tmp_path: Path, shards: list[list[tuple[str | None, float | None]]], **settings: Any) -> Recipe:
    """A scored corpus that the filter has gone through."""
    (tmp_path / "scored").mkdir(exist_ok=True)
    for number, rows in enumerate(shards):
        texts, scores = zip(*rows, strict=True)
        whole = [None if score is None else round(score) for score in scores]
        columns = {"text": texts, "score": pa.array(scores, pa.float32()), "int_score": pa.array(whole, pa.int8())}
        pq.write_table(pa.table(columns), tmp_path / "scored" / f"part-{number}.parquet")
    values = {"run_folder": tmp_path / "run", "filter": {"scored": tmp_path / "scored", "keep_share": 0.5, **settings}}
    recipe = Recipe.model_validate(values)
    filter.run(recipe)
    return recipe


ROWS = [[("best", 5.0), ("same", 3.0), ("worst", 0.0), ("same", 3.0), (None, None)], [("good", 4.0), ("bad", 1.0)]]


@pytest.mark.parametrize("settings", [{}, {"output_format": "jsonl"}, {"keep_dropped": True}])
def test_every_row_is_kept_or_rejected(tmp_path: Path, settings: dict[str, Any]) -> None:
    recipe = filtered(tmp_path, ROWS, keep_share=None, keep_documents=3, **settings)

    found = [(row.text, row.is_kept) for row in arms.rows(recipe)]

    assert sorted(text for text, is_kept in found if is_kept) == ["best", "good", "same", "same"]
    assert sorted(text for text, is_kept in found if not is_kept) == ["bad", "worst"]
    drawn = arms.draw(recipe, ["kept", "random", "rejected"], 10**6, {corpus.text_id("same"), "none"})
    assert dict(drawn.n_documents) == {"kept": 4, "random": 6, "rejected": 2}
    assert drawn.ids == {corpus.text_id("same")}


def test_of_copies_as_many_are_kept_as_the_kept_corpus_holds(tmp_path: Path) -> None:
    recipe = filtered(tmp_path, ROWS)
    path = tmp_path / "run" / "filter" / "kept" / "part-0.parquet"
    pq.write_table(pq.read_table(path).slice(0, 2), path)

    found = [row.text for row in arms.rows(recipe) if row.text == "same" and not row.is_kept]

    assert found == ["same"]


def test_a_kept_corpus_of_other_documents_is_refused(tmp_path: Path) -> None:
    recipe = filtered(tmp_path, ROWS)
    table = pa.table({"text": ["something else", "x"], "score": [1.0, 2.0], "int_score": [1, 2]})
    pq.write_table(table, tmp_path / "scored" / "part-1.parquet")

    with pytest.raises(
        UserError, match=r"documents that are not in the scored corpus .*; run gristmill filter --redo"
    ):
        list(arms.rows(recipe))


def test_a_draw_is_uniform_random_and_bounded() -> None:
    counts = np.zeros(40)
    for seed in range(300):
        draw = arms.Draw(100)
        for i in range(40):
            draw.add(priority(str(i), seed), f"{i:010d}", 10)
        texts = draw.texts()
        assert len(texts) == 10
        counts[[int(text) for text in texts]] += 1
    assert counts.sum() == 3000
    assert abs(counts - 75).max() < 4 * math.sqrt(75 * 0.75)


def test_blocks_are_whole_and_repeat_only_when_the_text_is_over() -> None:
    read = [np.arange(start, start + 10, dtype=np.int32) for start in (0, 10, 20)]

    once, twice = proof.blocks(read, 30, 8, 0), proof.blocks(read, 60, 8, 0)

    assert once.tolist() == np.arange(24).reshape(3, 8).tolist()
    assert twice.shape == (7, 8)
    assert (np.bincount(twice.ravel(), minlength=30) >= 1).all()
    assert np.bincount(twice.ravel()).max() == 2


def test_a_text_within_a_longer_one_is_a_copy(texts: list[str]) -> None:
    others = [texts[0], "Before it. " + texts[1] + " And after it, " + texts[2], texts[3]]
    trusted = [texts[1], texts[0].upper(), texts[10], texts[3][: len(texts[3]) // 2] + texts[11], "one two three"]

    assert arms.copied(trusted, others).tolist() == [True, True, False, False, False]
    assert arms.copied(trusted, []).tolist() == [False] * 5


def test_of_texts_that_say_the_same_the_first_counts(texts: list[str]) -> None:
    some = [texts[0], texts[1], texts[0] + " Again.", texts[2]]

    assert arms.repeated(some).tolist() == [False, False, True, False]


def test_a_model_from_scratch_says_every_text_and_is_the_same_for_a_seed(texts: list[str]) -> None:
    words = scratch.tokenizer(texts, 400)
    models = [scratch.model(Prove(layers=1, hidden_size=64), len(words), 32, seed) for seed in (1, 1, 2)]
    first, same, other = (model.model.embed_tokens.weight for model in models)

    assert len(words) == 400
    assert words.decode(words("naïve 漢字 \x00\n")["input_ids"]) == "naïve 漢字 \x00\n"
    assert first.equal(same)
    assert not first.equal(other)


# -- the difference ---------------------------------------------------------------------------------------------------


def studies(n: int, gain: float, n_seeds: int = 3, n_documents: int = 60) -> list[tuple[float, float]]:
    """Intervals of simulated studies in which seeds, documents and both together vary."""
    rng, found = np.random.default_rng(0), []
    for _ in range(n):
        sizes = np.exp(rng.normal(7.5, 0.8, n_documents))
        by_seed, by_document = rng.normal(0, 0.01, (n_seeds, 1)), rng.normal(0, 0.05, n_documents)
        both = rng.normal(0, 0.03, (n_seeds, n_documents))
        interval = contrast.estimate(sizes * (gain + by_seed + by_document + both), sizes).interval
        assert interval is not None
        found.append(interval)
    return found


def test_equal_arms_are_found_equal() -> None:
    share = np.mean([low <= 0 <= high for low, high in studies(2000, 0)])

    assert 0.94 <= share <= 0.99


def test_a_real_difference_is_found() -> None:
    assert np.mean([low > 0 for low, _ in studies(300, 0.1)]) > 0.95


def test_one_training_each_says_nothing() -> None:
    bits = {"kept": np.ones((1, 9)), "random": np.full((1, 9), 2.0)}

    found = contrast.compare("kept", "random", bits, np.ones(9, np.int64))

    assert found["gain"] == 1
    assert found["interval"] is None
    assert "from one training each; give prove.seeds 3 or more" in found["sentence"]


@pytest.mark.parametrize(
    ("shift", "sentence"),
    [
        (
            0.5,
            "Kept is better than random: 1.500 against 2.000 bits per byte on 40 trusted documents, a gain of 0.500",
        ),
        (
            -0.5,
            "Random is better than kept: 2.000 against 2.500 bits per byte on 40 trusted documents, a gain of 0.500",
        ),
        (0.0, "No difference found between kept and random: 2.000 and 2.000 bits per byte on 40 trusted documents"),
    ],
)
def test_the_sentence_says_what_was_found(shift: float, sentence: str) -> None:
    noise = np.tile([0.01, -0.01], 20)
    random = np.full((3, 40), 2.0)
    seeds = np.array([[0.001], [0.0], [-0.001]])
    bits = {"random": random, "kept": random - shift + noise + seeds}

    found = contrast.compare("kept", "random", bits, np.ones(40, np.int64))

    assert found["sentence"].startswith(sentence)
    assert ("is ruled out" in found["sentence"]) == (shift == 0)
