"""A token is drawn from the distribution that the settings leave, by random numbers of the document's own."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
import transformers

from pipeline import sampling
from pipeline.config import Teacher
from pipeline.engines import engine
from pipeline.errors import UserError
from pipeline.prompts import Choice, Prompt
from pipeline.teacher import identity, questions

GENERATING = Prompt(name="test", body="Grade this: {{ text }}", read="generate")
CHOOSING = Prompt(
    name="test",
    body="Grade this: {{ text }}",
    read="choices",
    choices=(Choice(value=1, answers=(" good",)), Choice(value=0, answers=(" bad",))),
)


def distributions() -> dict[str, Any]:
    """Logits (n_rows, vocabulary) of many shapes."""
    random = np.random.default_rng(0)
    flat, peaked = random.normal(0, 1e-3, (60, 40)), np.full((40, 30), -1e4)
    peaked[np.arange(40), random.integers(0, 30, 40)] = 0
    cut = random.normal(0, 2, (60, 50))
    cut[:, random.choice(50, 30, replace=False)] = -math.inf
    return {
        "sharp": random.normal(0, 6, (200, 50)),
        "soft": random.normal(0, 1, (200, 300)),
        "ties": random.integers(-2, 3, (200, 20)).astype(float),
        "near uniform": flat,
        "uniform": np.zeros((20, 17)),
        "one-hot": peaked,
        "cut before": cut,
        "three tokens": random.normal(0, 1, (100, 3)),
    }


def softmax(logits: Any) -> Any:
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def tail_free(logits: Any, z: float) -> set[int]:
    """Tokens in order of probability for as long as the second differences so far are at most the share z of all."""
    order = np.argsort(-logits, kind="stable")
    bends = np.abs(np.diff(np.diff(softmax(logits)[order])))
    if bends.sum() == 0:
        return set(order.tolist())
    n_middle = int(np.sum(np.cumsum(bends) / bends.sum() <= z))
    return set(order[: 1 + n_middle].tolist())


def top_a(logits: Any, a: float) -> set[int]:
    p = softmax(logits)
    return set(np.flatnonzero(p >= a * p.max() ** 2).tolist())


@pytest.mark.parametrize("kind", distributions())
@pytest.mark.parametrize(("processor", "naive"), [(sampling.TailFree, tail_free), (sampling.TopA, top_a)])
def test_tail_free_and_top_a_keep_the_tokens_of_a_direct_computation(processor, naive, kind):
    logits = distributions()[kind].astype(np.float32)
    for share in (0.003, 0.21, 0.5003, 0.85, 0.97, 0.9999):
        kept = processor(share)(None, torch.from_numpy(logits)).numpy()
        for row, found in zip(logits, kept, strict=True):
            stay = {token for token in naive(row.astype(float), share) if row[token] > -math.inf}
            assert stay
            assert set(np.flatnonzero(found > -math.inf).tolist()) == stay
            assert all(found[token] == row[token] for token in stay)


def test_tail_free_cuts_where_the_probabilities_have_bent_and_top_a_by_the_square_of_the_likeliest():
    """Probabilities 0.5, 0.3, 0.1, 0.06, 0.04: slopes 0.2, 0.2, 0.04, 0.02; bends 0, 0.16, 0.02, of 0.18."""
    logits = torch.tensor([[0.06, 0.5, 0.1, 0.04, 0.3]]).log()
    kept = {z: torch.nonzero(sampling.TailFree(z)(None, logits)[0] > -math.inf).flatten().tolist() for z in (0.5, 0.9)}
    assert kept == {0.5: [1, 4], 0.9: [1, 2, 4]}
    halves = torch.tensor([[0.0, 0.0, -math.inf, -math.inf]])  # of two bends, one is done at the second token
    assert torch.equal(sampling.TailFree(0.5)(None, halves), halves)
    assert sampling.TailFree(0.4)(None, halves)[0].tolist() == [0.0, *[-math.inf] * 3]
    for a, expected in ((0.1, [0, 1, 2, 3, 4]), (0.2, [0, 1, 2, 4]), (0.5, [1, 4]), (1.0, [1, 4])):
        assert torch.nonzero(sampling.TopA(a)(None, logits)[0] > -math.inf).flatten().tolist() == expected


def test_shares_outside_0_to_1_are_refused():
    for value in (0, 1.5, -0.1, "much"):
        with pytest.raises(ValueError, match=r"^tfs is .* and must be above 0, at most 1$"):
            sampling.TailFree(value)


WAYS: list[dict[str, Any]] = [
    {"temperature": 0.7},
    {"temperature": 2, "top_k": 5},
    {"top_p": 0.4},
    {"min_p": 0.3},
    {"typical_p": 0.5},
    {"epsilon_cutoff": 0.01},
    {"eta_cutoff": 0.02},
    {"top_h": 0.5},
    {"temperature": 1.5, "top_h": 0.9, "top_k": 30, "top_p": 0.8, "min_p": 0.02, "typical_p": 0.7},
    {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0},
]


@pytest.mark.parametrize("args", WAYS, ids=lambda args: " ".join(args))
def test_the_librarys_settings_leave_the_distribution_that_the_library_samples_from(tiny_causal: Path, args):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_causal)
    shape = {"top_k": 0, **args, "temperature": float(args.get("temperature", 1))}
    told = {"max_new_tokens": 1, "return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    out = model.generate(torch.arange(5, 65).reshape(6, 10), do_sample=True, pad_token_id=0, **shape, **told)
    named = {name: value for name, value in args.items() if name in Teacher.model_fields and value}
    for settings in (Teacher(temperature=1, args=args), Teacher.model_validate({"temperature": 1, **named})):
        if settings.args or named == args:
            scores = out.logits[0]
            for processor in sampling.processors(settings, [""] * 6, "cpu")[:-1]:
                scores = processor(None, scores)
            assert torch.equal(scores, out.scores[0])


def test_tokens_are_drawn_as_often_as_they_are_likely():
    p = torch.tensor([0.0, 0.35, 0.25, 0.0, 0.2, 0.15, 0.04, 0.01, 0.0])
    n = 20_000
    draw, scores = sampling.Draw(3, [f"key:{i:08x}" for i in range(n)]), p.log().expand(n, -1)
    first, second = (draw(None, scores) for _ in range(2))
    for drawn in (first, second):
        assert torch.equal((drawn == 0).sum(1), torch.ones(n, dtype=torch.int64))
        assert torch.equal((drawn == -math.inf).sum(1), torch.full((n,), 8))
        seen = Counter(drawn.argmax(1).tolist())
        likely = [token for token in range(9) if p[token] > 0]
        assert sorted(seen) == likely
        expected = p[likely].double() / p[likely].double().sum() * n
        assert scipy.stats.chisquare([seen[token] for token in likely], expected.numpy()).pvalue > 0.01
    both = [(first.argmax(1) == a) & (second.argmax(1) == b) for a in (1, 2) for b in (1, 2)]
    shares = [each.double().mean().item() for each in both]
    assert shares == pytest.approx([0.35**2, 0.35 * 0.25, 0.35 * 0.25, 0.25**2], abs=0.01)


def test_random_numbers_of_tokens_are_spread_evenly_and_stay_between_0_and_1():
    whole = torch.arange(-50_000, 50_000) * sampling.STRIDE
    found = sampling.scattered(torch.cat([whole, torch.tensor([0, -1, 2**63 - 1, -(2**63)])])).numpy()
    assert 0 < found.min() < found.max() < 1
    assert scipy.stats.kstest(found, "uniform").pvalue > 0.01
    assert abs(np.corrcoef(found[1:], found[:-1])[0, 1]) < 0.01


def test_what_rounding_does_to_the_scores_rarely_draws_another_token():
    """In half precision probabilities move by half a percent in all; about as many draws may change."""
    scores = torch.from_numpy(np.random.default_rng(0).normal(0, 2, (1, 5000))).expand(2000, -1)
    rounded = scores + torch.from_numpy(np.random.default_rng(1).normal(0, 0.005, (1, 5000)))
    salts = [sampling.numbers(0, f"a:{i}").getrandbits(62) for i in range(2000)]
    changed = sampling.race(scores.contiguous(), salts) != sampling.race(rounded.expand(2000, -1), salts)
    assert changed.double().mean() < 0.02


def test_random_numbers_are_those_of_the_seed_and_the_document():
    def first(seed: int, key: str) -> list[float]:
        numbers = sampling.numbers(seed, key)
        return [numbers.random() for _ in range(5)]

    assert first(0, "aaaa:0123") == first(0, "bbbb:0123")
    assert len({tuple(first(seed, key)) for seed in (0, 1, -1) for key in ("a:0", "a:1", "a:2")}) == 9


# -- what an answer depends on


def key(prompt: Prompt = GENERATING, **settings: Any) -> str:
    return questions(prompt, Teacher.model_validate({"model": "m", **settings}), ["A text."])[0].key


EVERY: dict[str, Any] = {"top_p": 0.9, "top_k": 5, "min_p": 0.1, "tfs": 0.9, "top_a": 0.2, "seed": 7}


def test_settings_of_sampling_make_another_question_only_where_answers_are_sampled():
    for name, value in EVERY.items():
        assert key(**{name: value}) == key()
        assert key(temperature=0.5, **{name: value}) != key(temperature=0.5)
        assert key(args={"do_sample": True}, **{name: value}) != key(args={"do_sample": True})
        assert key(temperature=0.5, args={"do_sample": False}, **{name: value}) == key(
            temperature=0.5, args={"do_sample": False}
        )


def test_settings_of_writing_make_another_question_only_where_answers_are_written():
    for changes in ({"max_tokens": 9}, {"temperature": 0.5, **EVERY}, {"repetition_penalty": 1.2}, {"stop": ["."]}):
        assert key(CHOOSING, **changes) == key(CHOOSING)
        assert key(GENERATING, **changes) != key(GENERATING)
    args = {"no_repeat_ngram_size": 3}
    assert key(CHOOSING, args=args) == key(CHOOSING)
    assert key(CHOOSING, args=args, engine="openai") != key(CHOOSING, engine="openai")


def test_arguments_of_the_chat_template_make_another_question_only_where_it_is_applied():
    raw, args = GENERATING.model_copy(update={"chat": False}), {"enable_thinking": False}
    assert key(raw, chat_template_args=args) == key(raw)
    assert key(GENERATING, chat_template_args=args) != key(GENERATING)


def test_settings_that_ask_for_nothing_are_not_named():
    assert {"stop", "top_k", "args", "tokenizer"}.isdisjoint(identity(GENERATING, Teacher(temperature=1)))
    named = identity(GENERATING, Teacher(temperature=1, stop=("\n",), top_k=3, args={"num_beams": 2}))
    assert (named["stop"], named["top_k"], named["seed"], named["args"]) == (["\n"], 3, 0, {"num_beams": 2})


@pytest.mark.parametrize("name", ["tfs", "top_a"])
@pytest.mark.parametrize("kind", ["vllm", "openai"])
def test_other_engines_refuse_what_only_transformers_can_before_anything_is_loaded(kind, name):
    settings = Teacher.model_validate({"engine": kind, "model": "m", "base_url": "http://127.0.0.1:9/v1", name: 0.5})
    told = rf"^teacher\.{name}: {kind} cannot sample so \(it is 0\.5\); take it out, or set --teacher\.engine transf"
    with pytest.raises(UserError, match=told):
        engine(settings)


def test_an_empty_stop_string_is_refused():
    with pytest.raises(UserError, match=r"^teacher\.stop: an empty text would end every answer"):
        engine(Teacher(model="m", stop=("\n", "")))
