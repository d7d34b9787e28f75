"""Human scores: the files that people and spreadsheets write, and how far humans agree."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from endpoint import corpus, number, recipe, says, serve
from hypothesis import given
from hypothesis import strategies as st

from pipeline import gold, metrics, rate
from pipeline.corpus import text_id
from pipeline.errors import UserError
from pipeline.gold import GoldDocument, between_raters, defused, undefused
from pipeline.sample import Document


def csv_file(tmp_path: Path, text: str, encoding: str = "utf-8", name: str = "gold.csv") -> Path:
    path = tmp_path / name
    path.write_bytes(text.encode(encoding))
    return path


def refused(path: Path) -> str:
    with pytest.raises(UserError) as stop:
        gold.read(path)
    assert "\n" not in str(stop.value)
    return str(stop.value).removeprefix(str(path))


# -- formats ----------------------------------------------------------------------------------------------------------


EXPECTED = [
    GoldDocument("a", 'he said "no",\nthen; left', {"human_1": 3.5, "human_anna": 0.0}),
    GoldDocument("c", "x", {"human_1": 5.0}),
]
PLAIN = 'id,text,human_1,human_anna,note\na,"he said ""no"",\nthen; left",3.5,0,n\nb,y,,,\nc,x,5,,n\n'


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("parting", [",", ";", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_the_dialects_of_spreadsheets_all_say_the_same(tmp_path: Path, encoding: str, parting: str, end: str):
    rows = [
        ["id", "text", "human_1", "human_anna", "note"],
        ["a", '"he said ""no"",\nthen; left"', '"3,5"' if parting == "," else "3,5", " 0 ", ""],
        ["b", "y", "", " ", ""],
        ["c", "x", "5", "", "n"],
    ]
    path = csv_file(tmp_path, "".join(parting.join(row) + end for row in rows), encoding)
    assert gold.read(path) == (EXPECTED, 1)


def test_a_first_line_may_name_the_separator_and_headers_may_hold_the_others(tmp_path: Path):
    assert gold.read(csv_file(tmp_path, "sep=;\r\n" + PLAIN.replace(",", ";").replace('";\n', '",\n'))) == (
        EXPECTED,
        1,
    )
    path = csv_file(tmp_path, '"id";"text";"human_1";"a, b, c, d, e"\na;x;3;n\n')
    assert gold.read(path)[0] == [GoldDocument("a", "x", {"human_1": 3.0})]


def test_json_lines_and_parquet_say_the_same_as_csv(tmp_path: Path):
    rows = [
        {"id": "a", "text": EXPECTED[0].text, "human_1": 3.5, "human_anna": 0, "note": [1]},
        {"id": "b", "text": "y", "human_1": None, "human_anna": None},
        {"id": "c", "text": "x", "human_1": 5.0},
    ]
    lines = tmp_path / "gold.jsonl"
    lines.write_text("\n\n".join(map(json.dumps, rows)))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "gold.parquet")
    assert (
        gold.read(lines)
        == gold.read(tmp_path / "gold.parquet")
        == gold.read(csv_file(tmp_path, PLAIN))
        == (EXPECTED, 1)
    )


def test_a_cell_may_be_as_long_as_a_document(tmp_path: Path):
    text = "word " * 200_000
    assert gold.read(csv_file(tmp_path, f'text,human\n"{text}",3\n'))[0] == [GoldDocument(None, text, {"human": 3.0})]


def test_an_id_alone_or_a_text_alone_is_enough(tmp_path: Path):
    assert gold.read(csv_file(tmp_path, "id,human\n7,3\n"))[0] == [GoldDocument("7", None, {"human": 3.0})]
    assert gold.read(csv_file(tmp_path, "Human Score,text\n3,x\n"))[0] == [
        GoldDocument(None, "x", {"Human Score": 3.0})
    ]


def test_whole_ids_that_pandas_made_floats_are_whole_and_nan_is_missing(tmp_path: Path):
    columns = {"id": [7.0, float("nan")], "text": ["x", "y"], "human": [float("nan"), 0.0], "human_2": [4, None]}
    pq.write_table(pa.table(columns), tmp_path / "gold.parquet")
    assert gold.read(tmp_path / "gold.parquet")[0] == [
        GoldDocument("7", "x", {"human_2": 4.0}),
        GoldDocument(None, "y", {"human": 0.0}),
    ]


# -- missing scores ---------------------------------------------------------------------------------------------------


def test_a_missing_score_is_never_a_zero_and_a_zero_never_missing(tmp_path: Path):
    path = csv_file(tmp_path, "id,human_1,human_2\na,0,\nb,,\nc,4,2\n")
    documents, n_unscored = gold.read(path)
    assert [document.scores for document in documents] == [{"human_1": 0.0}, {"human_1": 4.0, "human_2": 2.0}]
    assert [document.mean for document in documents] == [0.0, 3.0]
    assert n_unscored == 1


def test_empty_rows_below_a_table_are_no_rows(tmp_path: Path):
    assert gold.read(csv_file(tmp_path, "id,human\na,1\n,\n\n,\n")) == ([GoldDocument("a", None, {"human": 1.0})], 0)


# -- bad files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["good", "3/5", "1,5,0", "nan", "inf", "4 or 5", "1e3", "TRUE", "٣-"])
def test_anything_but_a_number_is_named_by_file_row_and_column(tmp_path: Path, value: str):
    path = csv_file(tmp_path, f'id,text,human_b\na,"x\ny",1\n\nb,z,"{value}"\n')
    assert refused(path) == f" row 4 column 'human_b': {value!r} is no score; write a number or leave it empty"


@pytest.mark.parametrize("value", ["true", "[3]", '{"a": 3}', "Infinity"])
def test_json_scores_are_numbers_or_null(tmp_path: Path, value: str):
    path = csv_file(tmp_path, f'{{"id": 1, "human": 3}}\n{{"id": 2, "human": {value}}}\n', name="gold.jsonl")
    assert " row 2 column 'human': " in refused(path)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("gold.csv", "id,text\na,b\n", "no column of human scores, such as human_score; there are: 'id', 'text'"),
        ("gold.csv", "name,human\na,3\n", "neither a column 'id' nor 'text'; there are: 'name', 'human'"),
        ("gold.csv", "", "neither a column 'id' nor 'text'; there are: none"),
        ("gold.csv", "id,human\na,\n", "no human score in 1 rows"),
        ("gold.csv", "id,human,human\na,3,4\n", "several columns called 'human'"),
        ("gold.csv", "id,text,human\na,one, two,3\n", "row 2 has 4 cells under 3 columns"),
        ("gold.csv", 'id,text,human\na,"never closed,3\n', "is no CSV near line 2"),
        ("gold.csv", "id,text,human\n,,3\n", "row 2 has a human score, but neither id nor text"),
        ("gold.csv", "id,human\na,3\na,4\n", "id 'a' stands in 2 rows"),
        ("gold.csv", "text,human\na,3\nb,1\na,4\n", "text 'a' stands in 2 rows"),
        ("gold.jsonl", '{"id": 1, "human": 3}\n[1]\n', "row 2 is not a JSON object"),
        ("gold.jsonl", '{"id": 1, "human": 3}\n{"id": \n', "row 2 is not JSON"),
        ("gold.jsonl", '{"id": 1.5, "human": 3}\n', "row 1 column 'id': 1.5 is neither text nor a whole number"),
        ("gold.parquet", "no parquet", "cannot be read"),
        ("gold.xlsx", "", "human scores are read from .csv, .tsv, .jsonl or .parquet"),
    ],
)
def test_a_bad_file_is_one_clear_line(tmp_path: Path, name: str, text: str, said: str):
    assert said in refused(csv_file(tmp_path, text, name=name))


def test_a_file_that_is_not_there_or_not_utf8_is_one_clear_line(tmp_path: Path):
    assert "No such file" in refused(tmp_path / "gold.csv")
    assert "No such file" in refused(tmp_path / "gold.parquet")
    assert "is not UTF-8" in refused(csv_file(tmp_path, "id,human\né,3\n", "latin-1"))


def test_two_texts_that_are_the_same_may_have_ids_that_are_not(tmp_path: Path):
    assert len(gold.read(csv_file(tmp_path, "id,text,human\na,x,3\nb,x,4\n"))[0]) == 2


# -- documents to rate ------------------------------------------------------------------------------------------------


SAMPLED = [Document("a", "whole text of a", 1.0, "web"), Document("b", "b")]


def test_gold_documents_are_those_of_the_sample_or_their_own_text():
    known = [
        GoldDocument("a", "whole te", {"human_1": 2.0, "human_2": 5.0}),
        GoldDocument("new", "own text", {"human_1": 4.0}),
        GoldDocument(None, "no id", {"human_1": 0.0}),
    ]
    assert gold.documents(known, SAMPLED) == [
        Document("a", "whole text of a", 3.5, "web"),
        Document("new", "own text", 4.0),
        Document(text_id("no id"), "no id", 0.0),
    ]


def test_an_id_that_nothing_knows_is_left_out_and_said(caplog: pytest.LogCaptureFixture):
    known = [GoldDocument(name, None, {"human": 3.0}) for name in ("x", "b", "y")] + [
        GoldDocument("z", " ", {"human": 1})
    ]
    assert gold.documents(known, SAMPLED) == [Document("b", "b", 3.0)]
    assert "3 ids, such as x, are not in the sample and have no text" in caplog.text
    with pytest.raises(UserError, match="none of 1 ids, such as x, is in the sample; add a column text"):
        gold.documents(known[:1], SAMPLED)


def test_a_text_that_stands_under_two_ids_is_rated_once():
    known = [GoldDocument(name, "same", {"human": score}) for name, score in (("x", 3.0), ("y", 4.0))]
    assert gold.documents(known, []) == [Document("x", "same", 3.0)]


def test_an_id_of_the_corpus_over_another_text_is_no_document_of_the_corpus(caplog: pytest.LogCaptureFixture):
    known = [
        GoldDocument("a", "Something else.", {"human": 4.0}),
        GoldDocument("b", "b, and more than the corpus has", {"human": 1.0}),
    ]
    assert gold.documents(known, SAMPLED) == [
        Document("a", "Something else.", 4.0),
        Document("b", "b, and more than the corpus has", 1.0),
    ]
    assert [record.getMessage() for record in caplog.records] == [
        "rate.gold: 2 rows, such as id a, hold another text than the corpus under that id; theirs is rated"
    ]


@pytest.mark.parametrize("seen", [None, "", " \n", "whole text of a", "whole\r\ntext  of", " whole te", "wholetext"])
def test_no_text_or_its_beginning_in_any_spacing_is_that_of_the_corpus(
    caplog: pytest.LogCaptureFixture, seen: str | None
):
    assert gold.documents([GoldDocument("a", seen, {"human": 2.0})], SAMPLED) == [SAMPLED[0]._replace(gold=2.0)]
    assert not caplog.records


# -- formulas ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["=1+1", "+49 30", "- a point", "@SUM(A1)", "\t=1", "\r=1", "'=1", "''@x"])
def test_no_defused_cell_begins_a_formula(text: str):
    assert defused(text) == "'" + text


@pytest.mark.parametrize("text", ["plain", "'tis", "''quoted''", "a=b", "", "3"])
def test_plain_text_stays_as_it_is(text: str):
    assert defused(text) == text


@given(st.text(alphabet="'=+-@\t\rab", min_size=1))
def test_what_was_defused_comes_back(text: str):
    assert undefused(Path("gold.csv"), 1, "text", defused(text)) == text
    assert defused(text)[0] not in "=+-@\t\r"


# -- agreement of humans ----------------------------------------------------------------------------------------------


def rated(*columns: list[float | None]) -> list[GoldDocument]:
    rows = zip(*columns, strict=True)
    return [
        GoldDocument(str(i), None, {f"human_{k}": score for k, score in enumerate(row) if score is not None})
        for i, row in enumerate(rows)
    ]


def test_the_ceiling_is_the_mean_over_pairs_of_humans():
    """Pairs: equal (kappa 1), and twice [0, 2, 5, 3] against [0, 3, 5, 3]: misses 1/4."""
    one: list[float | None] = [0, 2, 5, 3]
    other: list[float | None] = [0, 3, 5, 3]
    found = between_raters(rated(one, one, other), (0, 5)) or {}
    chance = 3.25 + 3.1875 + 0.25**2  # variances, and the squared difference of the means 2.5 and 2.75
    assert found["kappa"] == pytest.approx((1 + 2 * (1 - 0.25 / chance)) / 3)
    assert found["spearman"] == pytest.approx((1 + 2 * 0.9486833) / 3)
    assert (found["n_raters"], found["n"]) == (3, 4)


def test_humans_are_compared_on_what_both_scored():
    found = between_raters(rated([0, 1, 5, 4, None], [0, 1, 5, None, 2], [None, None, None, None, 3]), (0, 5)) or {}
    assert found == {"n": 4, "n_raters": 3, "kappa": pytest.approx(1), "spearman": pytest.approx(1)}


def test_a_single_human_has_no_ceiling_and_constant_humans_none_that_is_defined():
    assert between_raters(rated([0, 1, 5]), (0, 5)) is None
    found = between_raters(rated([3, 3, 3], [3, 3, 3]), (0, 5)) or {}
    assert found["kappa"] is None and found["spearman"] is None


def test_humans_off_the_scale_are_ranked_but_never_clipped_onto_it(caplog: pytest.LogCaptureFixture):
    people = rated([0, 20, 40, 100], [20, 20, 60, 80])
    assert gold.shared_scale(people, (0, 5)) is None
    assert caplog.messages == [
        "rate.gold: human scores go from 0 to 100, the prompt's scale from 0 to 5; kappa is left out"
    ]
    found = between_raters(people, None) or {}
    assert found == {"n": 4, "n_raters": 2, "spearman": pytest.approx(0.9486833)}
    truth, scores = np.array([0.0, 20, 40, 100]), np.array([1.0, np.nan, 3.0, 5.0])
    compared = rate.compared(scores, truth, False, None)
    assert set(compared) == {"n", "spearman", "spearman_interval"} and compared["n"] == 3


def test_one_human_below_the_scale_is_off_it_and_its_ends_are_on_it(caplog: pytest.LogCaptureFixture):
    assert gold.shared_scale(rated([1, 5], [3, None]), (1, 5)) == (1, 5)
    assert not caplog.records
    assert gold.shared_scale(rated([1, 5], [3, 0]), (1, 5)) is None, "the mean of 5 and 0 is no excuse"


@pytest.mark.parametrize("graded", ["id-4", "lost"])
def test_graded_humans_are_not_true_or_false_because_only_zeros_and_ones_could_be_compared(
    tmp_path: Path, graded: str
):
    """The graded document has no score from the teacher, or is not in the sample at all."""
    grades = {"id-0": 0, "id-1": 1, "id-2": 0, "id-3": 1, graded: 4}
    with serve(lambda a: says("no idea" if number(a) >= 4 else f"Score: {number(a) % 2}")) as server:
        corpus(tmp_path, 6)
        rows = "".join(f"{name},{grade}\n" for name, grade in grades.items())
        path = csv_file(tmp_path, "id,human_score\n" + rows)
        human = rate.run(recipe(tmp_path, server.url, n=6, rate={"gold": path})).human or {}
    assert human["n"] == 4
    assert human["spearman"] == pytest.approx(1) and "auc" not in human


def test_people_and_teacher_have_no_kappa_where_the_prompt_has_another_scale(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    with serve(lambda a: says(f"Score: {number(a) % 6}")) as server:
        corpus(tmp_path, 6)
        rows = "".join(f"id-{i},{i * 20},{i * 20}\n" for i in range(6))
        path = csv_file(tmp_path, "id,human_a,human_b\n" + rows)
        human = (
            rate.run(recipe(tmp_path, server.url, n=6, rate={"gold": path, "more_teachers": [{"model": "n"}]})).human
            or {}
        )
    for found in (human, human["between_people"], *human["raters"]):
        assert found["n"] == 6 and found["spearman"] == pytest.approx(1)
        assert not {"kappa", "kappa_interval", "mean_difference"} & set(found)
    assert len(human["raters"]) == 2
    assert sum("kappa is left out" in message for message in caplog.messages) == 1


def test_an_id_shared_by_two_texts_gives_the_human_score_to_the_text_that_people_saw(tmp_path: Path):
    with serve(lambda a: says("Score: 5" if "Another text" in a.shown else "Score: 0")) as server:
        corpus(tmp_path, 6)
        path = csv_file(tmp_path, "id,text,human_score\nid-1,Another text.,5\nid-2,,0\n")
        r = recipe(tmp_path, server.url, n=6, rate={"gold": path})
        rate.run(r)
    rows = {row["id"]: row for row in pq.read_table(r.run_folder / "rate" / "gold.parquet").to_pylist()}
    assert (rows["id-1"]["text"], rows["id-1"]["score"], rows["id-1"]["gold"]) == ("Another text.", 5, 5)
    assert (rows["id-2"]["score"], rows["id-2"]["gold"]) == (0, 0)


def test_the_ceiling_of_a_read_file_is_that_of_its_columns(tmp_path: Path):
    documents, _ = gold.read(csv_file(tmp_path, "id;human_a;human_b\n1;0;1\n2;2,5;3\n3;5;4\n4;1;1\n"))
    found = between_raters(documents, (0, 5)) or {}
    expected = metrics.agreement([0, 2.5, 5, 1], [1, 3, 4, 1], (0, 5))
    assert (found["kappa"], found["spearman"]) == (expected["kappa"], expected["spearman"])
