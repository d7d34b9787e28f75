"""Any encoder, frozen, gives the embeddings that its own files describe, whatever the batch."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import SMALL
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerFast

from pipeline import config
from pipeline.encoder import Embedded, Encoder
from pipeline.errors import UserError

DISTILBERT = {"vocab_size": 1000, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "initializer_range": 0.3}
SPECIAL = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
FROM_2 = {**SMALL, **SPECIAL, "max_position_embeddings": 66}
RELATIVE = {
    "relative_attention": True,
    "position_biased_input": False,
    "position_buckets": 8,
    "max_relative_positions": -1,
    "pos_att_type": ["p2c", "c2p"],
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
    "max_position_embeddings": 32,
}
FAMILIES = {
    "bert": ("Bert", {**SMALL, "max_position_embeddings": 128}, 128),
    "roberta": ("Roberta", FROM_2, 64),
    "xlm-roberta": ("XLMRoberta", FROM_2, 64),
    "mpnet": ("MPNet", FROM_2, 64),
    "distilbert": ("DistilBert", {**DISTILBERT, "max_position_embeddings": 100}, 100),
    "deberta-v2": ("DebertaV2", {**SMALL, **RELATIVE}, 512),
    "modernbert": (
        "ModernBert",
        {**SMALL, **SPECIAL, "cls_token_id": 0, "sep_token_id": 2, "max_position_embeddings": 96},
        96,
    ),
}
"""Class, settings, and the longest window when 512 tokens are asked for."""


def encoder(folder: Path, **settings: object) -> Encoder:
    values = {"model": str(folder), "max_tokens": 64, "dtype": "float32", "device": "cpu", **settings}
    return Encoder(config.Encoder.model_validate(values))


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory, texts: list[str], tiny_encoder: Path) -> dict[str, Path]:
    """WordPiece with [CLS] and [SEP]; byte-level BPE and unigram with <s> and </s>, padded with token 1."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

    special = ["<s>", "<pad>", "</s>", "<unk>"]
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    of_bpe = trainers.BpeTrainer(
        vocab_size=900, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    unigram = Tokenizer(models.Unigram())
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    of_unigram = trainers.UnigramTrainer(
        vocab_size=600, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    folders = {"wordpiece": tiny_encoder}
    for name, made, trainer in (("bpe", bpe, of_bpe), ("unigram", unigram, of_unigram)):
        made.train_from_iterator(texts, trainer)
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
        )
        folders[name] = tmp_path_factory.mktemp(name)
        PreTrainedTokenizerFast(
            tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
        ).save_pretrained(folders[name])
    return folders


TOKENIZER = {"bert": "wordpiece", "distilbert": "wordpiece", "xlm-roberta": "unigram", "deberta-v2": "unigram"}


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tokenizers: dict[str, Path]):
    """A small random model of one family: its name and folder."""
    name, settings, _ = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**settings)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizers[TOKENIZER.get(request.param, "bpe")]).save_pretrained(folder)
    return request.param, folder


POOL: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "mean": lambda states: states.mean(0),
    "cls": lambda states: states[0],
}


def naive(folder: Path, text: str, max_tokens: int, pooling: str = "mean") -> np.ndarray:
    """One text through plain transformers, nothing padded."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder, dtype=torch.float32)
    ids = tokenizer(text, truncation=True, max_length=max_tokens, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        return POOL[pooling](model.eval()(input_ids=ids).last_hidden_state[0]).numpy()


@pytest.mark.parametrize("pooling", [None, "cls"])
def test_trap_13_every_family_gives_its_own_embeddings_and_nothing_of_it_is_trained(
    family: tuple[str, Path], texts: list[str], pooling: str | None
):
    loaded = encoder(family[1], pooling=pooling, max_tokens=48)
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    mixed = [texts[0], "short", texts[1][:90], texts[2]]
    found = loaded.embed(mixed)
    expected = [naive(family[1], text, 48, pooling or "mean") for text in mixed]
    np.testing.assert_allclose(found.vectors, expected, atol=1e-5)
    assert np.ptp(found.vectors, axis=0).max() > 0.1 and found.tokens.tolist()[0] == 48
    assert all(torch.equal(value, before[name]) for name, value in loaded.model.state_dict().items())


def test_a_window_is_as_long_as_the_family_can_take(family: tuple[str, Path], texts: list[str]):
    loaded, longest = encoder(family[1], max_tokens=512), FAMILIES[family[0]][2]
    assert loaded.max_tokens == longest
    found = loaded.embed(["\n".join(texts)])
    assert found.tokens.tolist() == [longest] and np.isfinite(found.vectors).all()


def sentence_transformer_folder(folder: Path, bert: Path, *more: str) -> Path:
    """CLS pooling, normalisation and more modules around a BERT, as sentence-transformers writes them."""
    kinds = ["Transformer", "Pooling", "Normalize"]
    paths = ["", "1_Pooling", "2_Normalize"]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(zip(kinds, paths, strict=True))
    ]
    shutil.copytree(bert, folder)
    for name in more:
        modules.append({"idx": len(modules), "name": name, "path": name, "type": "sentence_transformers.models.Dense"})
        (folder / name).mkdir()
        Dense(32, 32, activation_function=torch.nn.Identity()).save(str(folder / name))
    (folder / "modules.json").write_text(json.dumps(modules))
    for path in paths[1:]:
        (folder / path).mkdir()
    pooling = {"word_embedding_dimension": 32, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder


@pytest.fixture(scope="module")
def normalised(tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> Path:
    return sentence_transformer_folder(tmp_path_factory.mktemp("st") / "st", tiny_encoder)


def test_pooling_is_what_the_folder_says(normalised: Path, tiny_encoder: Path, texts: list[str]):
    short = [text[:100] for text in texts[:4]]
    found = encoder(normalised, max_tokens=128).embed(short)
    np.testing.assert_allclose(
        found.vectors, SentenceTransformer(str(normalised), device="cpu").encode(short), atol=1e-5
    )
    cls = naive(tiny_encoder, short[0], 128, "cls")
    np.testing.assert_allclose(found.vectors[0], cls / np.linalg.norm(cls), atol=1e-5)
    assert found.n_truncated == 0


def test_a_pooling_that_is_set_replaces_the_folders_and_keeps_its_normalisation(
    normalised: Path, tiny_encoder: Path, texts: list[str]
):
    found = encoder(normalised, pooling="mean").embed(texts[:1]).vectors[0]
    mean = naive(tiny_encoder, texts[0], 64)
    np.testing.assert_allclose(found, mean / np.linalg.norm(mean), atol=1e-5)


def test_the_heads_of_a_student_folder_are_left_out(tmp_path: Path, tiny_encoder: Path, texts: list[str]):
    folder = sentence_transformer_folder(tmp_path / "student", tiny_encoder, "head_0", "head_1")
    found = encoder(folder).embed(texts[:2]).vectors
    bare = sentence_transformer_folder(tmp_path / "bare", tiny_encoder)
    np.testing.assert_allclose(found, encoder(bare).embed(texts[:2]).vectors, atol=1e-6)
    assert encoder(folder).fingerprint == encoder(bare).fingerprint


@pytest.fixture(scope="module")
def one_by_one(tiny_encoder: Path, texts: list[str]) -> tuple[list[str], list[Embedded]]:
    """Texts of many lengths, each embedded alone."""
    mixed = [text[: 40 + 37 * (i % 5)] for i, text in enumerate(texts[:10])]
    loaded = encoder(tiny_encoder, windows="all", max_tokens=32)
    return mixed, [loaded.embed([text]) for text in mixed]


@pytest.mark.parametrize("batch_tokens", [1, 100, 100_000])
def test_batch_size_changes_nothing_and_order_is_kept(tiny_encoder: Path, one_by_one, batch_tokens: int):
    mixed, alone = one_by_one
    together = encoder(tiny_encoder, batch_tokens=batch_tokens, windows="all", max_tokens=32).embed(mixed)
    np.testing.assert_allclose(together.vectors, np.concatenate([one.vectors for one in alone]), atol=1e-5)
    assert together.owners.tolist() == [i for i, one in enumerate(alone) for _ in one.owners]
    assert together.tokens.tolist() == [n for one in alone for n in one.tokens]
    assert len(together.owners) > len(mixed)


def test_a_window_is_embedded_like_a_text_of_its_own(tiny_encoder: Path, texts: list[str]):
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    ids = tokenizer(texts[0], add_special_tokens=False)["input_ids"]
    found = encoder(tiny_encoder, windows="spread").embed(texts[:1])
    middle = (len(ids) - 62) // 2
    model = AutoModel.from_pretrained(tiny_encoder)
    window = [tokenizer.cls_token_id, *ids[middle : middle + 62], tokenizer.sep_token_id]
    with torch.inference_mode():
        expected = model(torch.tensor([window])).last_hidden_state[0].mean(0)
    assert len(found.owners) == 3 and len(ids) > 3 * 62
    np.testing.assert_allclose(found.vectors[1], expected.numpy(), atol=1e-5)


def test_progress_counts_each_document_once(tiny_encoder: Path, texts: list[str]):
    for how in ("first", "spread", "all"):
        steps: list[int] = []
        encoder(tiny_encoder, windows=how, batch_tokens=200).embed([*texts[:7], "", "short"] * 20, steps.append)
        assert sum(steps) == 180 and len(steps) > 2


def test_trap_18_documents_longer_than_the_encoder_reads_are_counted(tiny_encoder: Path, texts: list[str]):
    several = [texts[0], "short", texts[1], " ".join(texts[0].split()[:8])]
    counts = {how: encoder(tiny_encoder, windows=how).embed(several).n_truncated for how in ("first", "spread", "all")}
    assert counts == {"first": 2, "spread": 2, "all": 0}


def test_a_document_of_50_mb_costs_no_more_than_a_page(tiny_encoder: Path, texts: list[str]):
    huge = (texts[0] + " ") * (50_000_000 // len(texts[0]))
    found = encoder(tiny_encoder).embed([huge, texts[0]])
    np.testing.assert_allclose(found.vectors[0], found.vectors[1], atol=1e-5)
    assert found.n_truncated == 2


def test_odd_texts_are_embedded(tiny_encoder: Path):
    odd = ["\0\0", "a" * 100_000, "\U0001f600" * 50, "\ufffd", " .", ""]
    for how in ("first", "all"):
        assert np.isfinite(encoder(tiny_encoder, windows=how).embed(odd).vectors).all()


def test_a_documents_embedding_is_the_mean_of_its_windows():
    vectors = np.array([[1, 0], [4, 2], [0, 8]], np.float32)
    embedded = Embedded(vectors, np.array([0, 1, 1]), np.array([5, 30, 10]), np.zeros(2, np.bool_))
    assert embedded.documents().tolist() == [[1, 0], [2, 5]]
    assert embedded.documents(weighted=True).tolist() == [[1, 0], [3, 3.5]]
    assert embedded.documents(weighted=True).dtype == np.float32


def test_no_texts_have_embeddings_of_the_right_width(tiny_encoder: Path):
    found = encoder(tiny_encoder).embed([])
    assert found.vectors.shape == found.documents().shape == (0, 32) and found.n_truncated == 0


def test_the_fingerprint_is_of_the_content_not_of_the_place(tmp_path: Path, tiny_encoder: Path):
    shutil.copytree(tiny_encoder, tmp_path / "copy")
    (tmp_path / "copy" / "README.md").write_text("Another text about the same model.")
    own, copy = encoder(tiny_encoder), encoder(tmp_path / "copy", batch_tokens=100)
    before = own.fingerprint
    own.embed(["a text"])
    assert own.fingerprint == before == copy.fingerprint
    model = AutoModel.from_pretrained(tmp_path / "copy")
    model.encoder.layer[0].output.dense.bias.data[0] += 1e-3
    model.save_pretrained(tmp_path / "copy")
    assert encoder(tmp_path / "copy").fingerprint != before
    with torch.no_grad():
        own.model[0].auto_model.pooler.dense.bias[0] += 1
    assert own.fingerprint != before


def test_every_setting_that_changes_an_embedding_changes_the_fingerprint(tiny_encoder: Path):
    others = [{}, {"pooling": "cls"}, {"max_tokens": 32}, {"windows": "all"}, {"dtype": "bfloat16"}]
    assert len({encoder(tiny_encoder, **other).fingerprint for other in others}) == len(others)
    assert encoder(tiny_encoder, pooling="mean").fingerprint == encoder(tiny_encoder).fingerprint


def test_another_vocabulary_changes_the_fingerprint(tiny_encoder: Path):
    changed = encoder(tiny_encoder)
    changed.tokenizer.add_tokens(["photosynthesis"])
    assert changed.fingerprint != encoder(tiny_encoder).fingerprint


def test_an_encoder_that_cannot_be_loaded_is_named(tmp_path: Path, tiny_encoder: Path):
    with pytest.raises(UserError, match=r"encoder.model: nobody/nothing cannot be loaded"):
        encoder(Path("nobody/nothing"))
    with pytest.raises(UserError, match=r"package 'no_such_package' is not installed"):
        encoder(Path("package:no_such_package/model"))
    shutil.copytree(tiny_encoder, tmp_path / "damaged")
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"half a file")
    with pytest.raises(UserError, match=r"encoder.model: .*damaged cannot be loaded"):
        encoder(tmp_path / "damaged")


@pytest.mark.parametrize("family_name", ["bert", "roberta", "deberta-v2"])
def test_an_encoder_without_a_tokenizer_is_named(tmp_path: Path, family_name: str):
    """Loaders make up one that knows no word."""
    name, settings, _ = FAMILIES[family_name]
    getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**settings)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"encoder.model: .* has no tokenizer; put the model's tokenizer.json"):
        encoder(tmp_path)


def test_an_encoder_that_gives_nan_says_so(tmp_path: Path, tiny_encoder: Path):
    shutil.copytree(tiny_encoder, tmp_path / "nan")
    model = AutoModel.from_pretrained(tmp_path / "nan")
    torch.nn.init.constant_(model.encoder.layer[0].output.dense.weight, float("nan"))
    model.save_pretrained(tmp_path / "nan")
    with pytest.raises(UserError, match="gives NaN"):
        encoder(tmp_path / "nan").embed(["text"])
