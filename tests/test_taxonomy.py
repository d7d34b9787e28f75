"""A taxonomy takes every spelling of its own labels and nothing else; an answer names labels or says why not."""

import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import prompts, taxonomy, teacher
from pipeline.errors import UserError
from pipeline.prompts import Prompt
from pipeline.reading import Reading, read_label
from pipeline.taxonomy import STEP, Taxonomy
from pipeline.teacher import Answer

ROOT = Path(__file__).parent.parent
SHIPPED = sorted((ROOT / "taxonomies").glob("*.yaml"))
SHOPS = Taxonomy.model_validate({"labels": ["E-commerce", "Law", "Law of the sea", "Niñez"]})
CARE = Taxonomy.model_validate(
    {
        "levels": ["domain", "use_case"],
        "labels": [
            {"name": "Health", "about": "care", "labels": ["Nursing", "Advice, by phone", "Forms"]},
            {"name": "Law", "labels": ["Contracts: drafting", "Forms"]},
        ],
    }
)


def plain(text: str) -> str:
    """Without accents."""
    return "".join(c for c in unicodedata.normalize("NFD", text) if not unicodedata.combining(c))


SPELLINGS = {
    "as it stands": str,
    "capitals": str.upper,
    "small letters": str.lower,
    "titles": str.title,
    "no accents": plain,
    "no accents, capitals": lambda name: plain(name).upper(),
    "decomposed": lambda name: unicodedata.normalize("NFD", name),
    "hyphens": lambda name: name.replace(" ", "-"),
    "no spaces": lambda name: name.replace(" ", ""),
    "bold, with a full stop": lambda name: f"**{name}.**",
    "quoted": lambda name: f"«{name}»",
    "another step": lambda name: name.replace(STEP, " / "),
}


# -- the shipped ones


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
@pytest.mark.parametrize("spell", SPELLINGS.values(), ids=SPELLINGS.keys())
def test_every_shipped_label_in_any_spelling_is_itself_and_no_other(path, spell):
    labels = taxonomy.load(path)
    assert {name: labels.match(spell(name)) for name in labels.paths} == {name: name for name in labels.paths}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
@given(data=st.data())
def test_no_piece_of_a_shipped_label_is_taken_for_another(path, data):
    """A cut label is its own last level in full, or nothing."""
    labels = taxonomy.load(path)
    name = data.draw(st.sampled_from(labels.paths))
    start, end = sorted(data.draw(st.tuples(*[st.integers(0, len(name))] * 2)))
    found = labels.match(name[start:end])
    last = taxonomy.folded(name.split(STEP)[-1])
    assert found is None or taxonomy.folded(name[start:end]) in (taxonomy.folded(found), last)


@pytest.mark.parametrize("path", [path for path in SHIPPED if path.stem.endswith("-es")], ids=lambda path: path.stem)
def test_the_spanish_taxonomy_has_eight_domains_with_use_cases_that_are_all_told_apart(path):
    labels = taxonomy.load(path)
    assert labels.levels == ("dominio", "caso_de_uso") and labels.no_match == "Ninguno de estos"
    assert len(labels.labels) == 8
    assert all(5 <= len(domain.labels) <= 8 for domain in labels.labels)
    assert all(label.about for domain in labels.labels for label in (domain, *domain.labels))
    last = [name.split(STEP)[-1] for name in labels.paths]
    assert all(labels.match(name) for name in last), "a use case alone says which domain is meant"
    assert not {sign for name in labels.paths for sign in name} & set(',;:"|[]{}')


@pytest.mark.parametrize("name", ["domains", "dominios-es", "usos-es"])
def test_a_shipped_prompt_shows_each_of_its_labels_once_and_reads_it_back(name):
    prompt = prompts.load(ROOT / "prompts" / f"{name}.md")
    assert prompt.labels is not None and prompt.form is not None
    shown = prompt.turns("a document")[-1]["content"].splitlines()
    for path in prompt.labels.paths:
        assert sum(line == f"- {path}" or line.startswith(f"- {path}: ") for line in shown) == 1
        written = f'{{"motivo": "x", "labels": ["{path}"]}}' if prompt.multi else path
        assert teacher.read(prompt, Answer("stop", written)).labels == (path,)


# -- matching


@pytest.mark.parametrize(
    "written", ["E-commerce", "e commerce", "ECOMMERCE", "E‑commerce", " e–commerce. ", "É-commerce"]
)
def test_trap_09_a_hyphen_is_never_cut_at(written):
    assert SHOPS.match(written) == "E-commerce"


@pytest.mark.parametrize("written", ["E", "commerce", "", "-", "Law of", "Law of the sea and air", "sea", "niñ"])
def test_a_part_of_a_label_is_no_label(written):
    assert SHOPS.match(written) is None


NAMES = st.lists(
    st.text(st.characters(categories=["L", "N", "Zs"], include_characters="-&'(),.", max_codepoint=0x24F), max_size=20)
    .map(str.strip)
    .filter(taxonomy.folded)
    .filter(lambda name: taxonomy.folded(name) != "noneofthese" and "ı" not in name),
    min_size=1,
    max_size=8,
    unique_by=taxonomy.folded,
)


@given(names=NAMES, spell=st.sampled_from(list(SPELLINGS.values())))
def test_any_labels_that_a_taxonomy_takes_come_back_as_themselves(names, spell):
    labels = Taxonomy.model_validate({"labels": names})
    assert [labels.match(spell(name)) for name in names] == names


@given(names=NAMES, separator=st.sampled_from(["; ", " | "]))
def test_any_list_of_labels_is_read_back_in_its_order(names, separator):
    prompt = asking({"labels": names}, multi=True)
    assert read_label(prompt, separator.join(names), True) == Reading(None, labels=tuple(names))


def test_a_last_level_alone_will_do_where_it_is_the_only_one():
    assert CARE.match("nursing") == "Health > Nursing"
    assert CARE.match("Forms") is None
    assert CARE.match("Law: forms") == "Law > Forms"
    assert CARE.match("Health") is None


def test_a_label_fills_the_column_of_each_level_and_no_match_fills_them_all():
    assert CARE.columns("Law > Forms") == {"domain": "Law", "use_case": "Forms"}
    assert CARE.columns("None of these") == {"domain": "None of these", "use_case": "None of these"}
    assert CARE.columns(None) == {"domain": None, "use_case": None}


@pytest.mark.parametrize("order", range(5))
def test_labels_are_listed_once_in_any_order_each_domain_together_and_no_match_last(order):
    lines = CARE.listed(order).splitlines()
    assert sorted(lines) == sorted(["Health: care", *(f"- {path}" for path in CARE.paths)])
    assert lines[-1] == "- None of these"
    at = lines.index("Health: care")
    assert all(line.startswith("- Health > ") for line in lines[at + 1 : at + 4])


def test_another_order_is_another_list():
    assert len({CARE.listed(order) for order in range(10)}) > 1


def test_a_label_of_no_match_with_a_place_of_its_own_stands_once():
    labels = Taxonomy.model_validate({"labels": ["none of these!", "Law"]})
    assert labels.paths == ("none of these!", "Law")
    assert labels.no_match_path == "none of these!"
    assert labels.listed() == "- none of these!\n- Law"


# -- files


WRONG = [
    ("labels: []", "labels: "),
    ("labels: [A, a]", "labels 'A' and 'a' cannot be told apart; rename one"),
    ("labels: [A, A]", "a label stands twice"),
    ("labels: [A-B, A b]", "cannot be told apart"),
    ("labels: ['!!']", "cannot be told apart"),
    ("labels: [A > B]", "no > in a name"),
    ("labels: [{name: A, labels: [B]}]", "label 'A': the taxonomy has"),
    ("levels: [one, two]\nlabels: [A]", "label 'A': the taxonomy has"),
    ("levels: [one, two, three]\nlabels: [A]", "must be one or two different names"),
    ("levels: [text]\nlabels: [A]", "level 'text' cannot be a column"),
    ("levels: [a b]\nlabels: [A]", "level 'a b' cannot be a column"),
    ("labels: [A]\nlevel: x", "level: Extra inputs"),
    ("labels: [", "is not YAML"),
]


@pytest.mark.parametrize(("text", "complaint"), WRONG, ids=[text for text, _ in WRONG])
def test_a_taxonomy_that_cannot_work_is_refused_in_one_line(text, complaint, tmp_path):
    (tmp_path / "labels.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        taxonomy.load(tmp_path / "labels.yaml")
    assert complaint in str(caught.value) and "labels.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_taxonomy_is_named_with_its_prompt(tmp_path):
    (tmp_path / "p.md").write_text("---\nread: label\nlabels: there/not.yaml\n---\n{{ labels }} {{ text }}")
    with pytest.raises(UserError, match=r"labels: .*there/not\.yaml cannot be read"):
        prompts.load(tmp_path / "p.md")


# -- reading an answer


def asking(labels: Any = SHOPS, **changes: Any) -> Prompt:
    """A prompt that asks for one label."""
    body = "{{ labels }}\n{{ text }}"
    return Prompt.model_validate({"name": "test", "read": "label", "body": body, "labels": labels, **changes})


ONE = [
    ("E-commerce", ("E-commerce",)),
    ("Label: e-commerce.", ("E-commerce",)),
    ("- **E-commerce**", ("E-commerce",)),
    ("It is about shops, or Law.\n\nLabel: E-commerce\n", ("E-commerce",)),
    ("- Law: no, there is no statute\n- Niñez: no\n\nE-commerce", ("E-commerce",)),
    ("- Law\n- Law", ("Law",)),
    ("Law of the sea", ("Law of the sea",)),
    ('{"label": "niñez"}', ("Niñez",)),
    ('```json\n{"label": ["Law"]}\n```', ("Law",)),
    ('{"label": "Law"} no, {"label": "Ninez"}', ("Niñez",)),
    ("None of these", ("None of these",)),
]


@pytest.mark.parametrize(("answer", "labels"), ONE, ids=[answer for answer, _ in ONE])
def test_one_label_is_read_on_the_last_line_or_in_json(answer, labels):
    assert read_label(asking(), answer, True) == Reading(None, labels=labels)


NONE = [
    ("Shipping", "unknown_label", ("Shipping",)),
    ("Label: Shipping: by sea", "unknown_label", ("by sea",)),
    ("E", "unknown_label", ("E",)),
    ("Law and Niñez", "unknown_label", ("Law and Niñez",)),
    ('{"label": ["Law", "Niñez"]}', "several_labels", ()),
    ("- E-commerce\n- Law\n- Law of the sea\n- Niñez\n- None of these", "several_labels", ()),
    ("It could be:\n1. Law\n2. Niñez", "several_labels", ()),
    ('{"label": null}', "no_label", ()),
    ("", "no_label", ()),
    (" \n***\n", "no_label", ()),
    ("I'm sorry, I can't help with that.", "refused", ()),
    ("Lo siento, no puedo clasificarlo.", "refused", ()),
]


@pytest.mark.parametrize(("answer", "reason", "unknown"), NONE, ids=[answer for answer, _, _ in NONE])
def test_what_is_no_label_has_a_reason_and_is_kept_as_written(answer, reason, unknown):
    assert read_label(asking(), answer, True) == Reading(None, reason, unknown=unknown)


@pytest.mark.parametrize(
    ("answer", "labels"),
    [
        ("Law", ()),
        ("Because", ()),
        ("- Law\n- E-commerce\n- Ni", ()),
        ("Law\nBecause it is", ("Law",)),
        ('{"label": "Law"}', ("Law",)),
        ("", ()),
    ],
)
def test_of_an_unfinished_answer_only_what_cannot_go_on_is_read(answer, labels):
    """Law may have been going to be Law of the sea."""
    found = read_label(asking(), answer, False)
    assert (found.labels, found.reason) == (labels, None if labels else "truncated")


SEVERAL = [
    ('{"labels": ["Law", "niñez"]}', ("Law", "Niñez"), ()),
    ('{"why": "Law?", "labels": ["Niñez", "NIÑEZ"]}', ("Niñez",), ()),
    ('{"labels": ["Law", "Shipping"]}', ("Law",), ("Shipping",)),
    ('{"labels": ["None of these", "Law"]}', ("Law",), ()),
    ('{"labels": ["None of these"]}', ("None of these",), ()),
    ("Labels: Law, E-commerce, Niñez", ("Law", "E-commerce", "Niñez"), ()),
    ("Law; E-commerce", ("Law", "E-commerce"), ()),
    ("These fit:\n- Law\n- Shipping\n- Niñez", ("Law", "Niñez"), ("Shipping",)),
    ("1. Law\n2. E-commerce", ("Law", "E-commerce"), ()),
]


@pytest.mark.parametrize(("answer", "labels", "unknown"), SEVERAL, ids=[answer for answer, _, _ in SEVERAL])
def test_several_labels_are_read_where_several_are_allowed(answer, labels, unknown):
    assert read_label(asking(multi=True), answer, True) == Reading(None, labels=labels, unknown=unknown)


@pytest.mark.parametrize("answer", ['{"labels": ["Law", "Ni', "- Law\n- Ni", '{\n "labels": [\n  "Law",\n  "Ni'])
def test_a_cut_list_of_labels_is_no_list(answer):
    assert read_label(asking(multi=True), answer, False) == Reading(None, "truncated")


def test_names_with_commas_and_colons_are_never_cut_at_them():
    labels = ("Health > Advice, by phone", "Law > Contracts: drafting")
    listed = "Labels: Advice, by phone, Contracts: drafting"
    assert read_label(asking(CARE, multi=True), listed, True) == Reading(None, labels=labels)
    assert read_label(asking(CARE), "Label: Law > Contracts: drafting", True).labels == labels[1:]
    assert read_label(asking(CARE), "Contracts: drafting", True).labels == labels[1:]


def test_a_label_named_in_the_rationale_is_not_taken_for_the_answer():
    answer = '{"why": "Not Law; \\"label\\": \\"Law\\"", "label": "Niñez"}'
    assert read_label(asking(rationale="why"), answer, True).labels == ("Niñez",)
