"""Before align: prompts and replies from pairs that people preferred, or from a table of instructions."""

import heapq
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pipeline import conversations, corpus, storage
from pipeline.config import Corpus, Recipe
from pipeline.corpus import text_id
from pipeline.errors import UserError, required
from pipeline.sample import priority
from pipeline.shards import Counts, find_shards, fingerprint
from pipeline.tracking import Result, Stage, progress, stage

log = logging.getLogger("gristmill")

HUB = {"arlhf": "Dahoas/rm-static", "shp": "stanfordnlp/SHP"}
"""Sources by name."""
ACTOR, PROMPTS, REWARD = "actor_training_data.json", "rlhf_training_data.json", "reward_training_data.json"
PREFERENCES = "preferences.jsonl"
Row = dict[str, Any]


class PrepareResult(Result):
    """What became of a source's rows."""

    source: str
    n_rows: int
    n_drawn: int
    left_out: dict[str, int]
    """Rows that are not used, by reason."""
    n_actor: int
    """Distinct prompts with the preferred reply."""
    n_prompts: int
    n_reward: int
    """Distinct replies, preferred and rejected, to be rated."""
    n_preferences: int


class Drawn(NamedTuple):
    """A prompt with its reply, and the reply that people liked less, if there are two."""

    user_input: str
    completion: str
    rejected: str | None = None


class Unusable(Exception):
    """Why a row is left out."""


def run(recipe: Recipe, redo: bool = False) -> PrepareResult:
    """Draw rows of the source and write them as the later steps read them."""
    source = required(recipe.align.source, "align.source", "arlhf, shp or a file of prompt, chosen and rejected")
    with stage("prepare", recipe, inputs(recipe, source)) as work:
        done = work.finished(PrepareResult, redo, all((work.folder / name).exists() for name in (ACTOR, PROMPTS)))
        if done:
            return done
        left_out: Counter[str] = Counter()
        with progress("prepare", None, unit="rows") as step:
            drawn = draw(counted(rows(source), step, left_out), recipe, left_out)
        if not drawn:
            told = ", ".join(f"{reason} {n}" for reason, n in left_out.items()) or "it is empty"
            raise UserError(f"align.source: nothing of {source} can be used ({told})")
        return work.finish(write(work, source, drawn, left_out))


def inputs(recipe: Recipe, source: str) -> dict[str, Any]:
    """Everything that decides what is drawn."""
    path, where = Path(source), where_it_is(source)
    files = (
        {path.name: storage.content(path)}
        if is_json(path)
        else {shard.name: fingerprint(shard) for shard in shards(where)}
    )
    return {"source": where.path, "files": files, "sample": recipe.align.sample, "seed": recipe.seed}


def write(work: Stage, source: str, drawn: list[Drawn], left_out: Counter[str]) -> PrepareResult:
    """The files of the later steps; each row of them is there once."""
    pairs = [each for each in drawn if each.rejected is not None]
    replies = [(each.user_input, reply) for each in pairs for reply in (each.completion, each.rejected)]
    made: dict[str, list[Row]] = {
        ACTOR: [{"user_input": each.user_input, "completion": each.completion} for each in drawn],
        PROMPTS: [{"user_input": each.user_input} for each in drawn],
        REWARD: [{"user_input": asked, "completion": reply, "score": None} for asked, reply in replies],
        PREFERENCES: [
            {"prompt": each.user_input, "chosen": each.completion, "rejected": each.rejected} for each in pairs
        ],
    }
    made = {name: distinct(found) for name, found in made.items()}
    for name, found in made.items():
        (work.folder / name).unlink(missing_ok=True)
        if found:
            conversations.write(work.folder / name, found)
    return PrepareResult(
        seconds=work.seconds,
        source=source,
        n_rows=len(drawn) + left_out.total(),
        n_drawn=len(drawn),
        left_out=dict(left_out),
        n_actor=len(made[ACTOR]),
        n_prompts=len(made[PROMPTS]),
        n_reward=len(made[REWARD]),
        n_preferences=len(made[PREFERENCES]),
    )


def distinct(found: list[Row]) -> list[Row]:
    """Rows in order, each once."""
    return list({tuple(row.values()): row for row in found}.values())


# -- reading ----------------------------------------------------------------------------------------------------------


def where_it_is(source: str) -> Corpus:
    """A source by name, or the path or Hub name that was given."""
    return Corpus(path=HUB.get(source.lower(), source))


def is_json(path: Path) -> bool:
    """Whether a file is JSON, which may be an array."""
    return path.suffix in (".json", ".jsonl") and path.is_file()


def shards(where: Corpus) -> list[Any]:
    """The shards of a source that is a corpus."""
    try:
        return find_shards(where)
    except UserError as error:
        raise UserError(str(error).replace("corpus.path", "align.source")) from None


def rows(source: str) -> Iterator[Row]:
    """The rows of a source as they are."""
    if is_json(Path(source)):
        yield from (row for _, row in conversations.rows(Path(source), "align.source"))
        return
    where = where_it_is(source)
    for shard in shards(where):
        for batch in corpus.read(shard, where, Counts()):
            yield from batch.to_pylist()


def counted(found: Iterator[Row], step: Callable[[int], None], left_out: Counter[str]) -> Iterator[Drawn]:
    """Rows that can be used, each once; why the others cannot is counted."""
    seen: set[int] = set()
    for row in found:
        step(1)
        try:
            drawn = usable(of(row)(row))
        except Unusable as reason:
            left_out[str(reason)] += 1
            continue
        name = priority("\0".join(str(part) for part in drawn), 0)
        if name in seen:
            left_out["copy"] += 1
        else:
            seen.add(name)
            yield drawn


def draw(found: Iterator[Drawn], recipe: Recipe, left_out: Counter[str]) -> list[Drawn]:
    """A uniform draw by content: the smallest of seeded hashes."""
    n = 0

    def ranked() -> Iterator[tuple[int, Drawn]]:
        nonlocal n
        for n, each in enumerate(found, 1):  # noqa: B007
            yield priority(text_id("\0".join(str(part) for part in each)), recipe.seed), each

    drawn = [each for _, each in heapq.nsmallest(recipe.align.sample, ranked(), key=lambda pair: pair[0])]
    left_out.update({"not drawn": n - len(drawn)} if n > len(drawn) else {})
    return drawn


def usable(drawn: Drawn) -> Drawn:
    """A prompt and replies that say something, or why they cannot be used."""
    parts = {"prompt": drawn.user_input, "reply": drawn.completion, "rejected reply": drawn.rejected}
    for name, part in parts.items():
        if name == "rejected reply" and part is None:
            continue
        if not isinstance(part, str):
            raise Unusable(f"{name} is no text")
        if not part.strip():
            raise Unusable(f"{name} is empty")
    if drawn.rejected is not None and drawn.rejected.strip() == drawn.completion.strip():
        raise Unusable("both replies are the same")
    return Drawn(*(None if part is None else conversations.repaired(part).strip() for part in drawn))  # type: ignore[arg-type]


# -- what the columns mean --------------------------------------------------------------------------------------------


def of(row: Row) -> Callable[[Row], Drawn]:
    """How the columns of a row are read."""
    for names, read in FORMS:
        if all(name in row for name in names):
            return read
    told = "; or ".join(", ".join(names) for names, _ in FORMS)
    raise UserError(f"align.source: there are the columns {', '.join(row) or '(none)'}; needed are {told}")


def preferred(row: Row) -> Drawn:
    """Prompt, chosen and rejected: ARLHF, and files of one's own."""
    return Drawn(user_input(row["prompt"]), row["chosen"], row["rejected"])


def transcripts(row: Row) -> Drawn:
    """Chosen and rejected as whole conversations that differ in the last reply."""
    sides = [last_reply(row[name]) for name in ("chosen", "rejected")]
    if sides[0][0] != sides[1][0]:
        raise Unusable("the replies are to different prompts")
    return Drawn(user_input(sides[0][0]), sides[0][1], sides[1][1])


def compared(row: Row) -> Drawn:
    """SHP: two comments on a post; labels is 1 where A was preferred."""
    if row["labels"] not in (0, 1):
        raise Unusable("labels is neither 0 nor 1")
    names = ("human_ref_A", "human_ref_B") if row["labels"] == 1 else ("human_ref_B", "human_ref_A")
    return Drawn(row["history"], *(row[name] for name in names))


def instructed(row: Row) -> Drawn:
    """An instruction, perhaps with material to work on, and its answer."""
    material = next((row[name] for name in ("input", "context") if row.get(name)), None)
    reply = next(row[name] for name in ("output", "response") if name in row)
    return Drawn(f"{row['instruction']}\n\n{material}" if material else row["instruction"], reply)


FORMS: list[tuple[tuple[str, ...], Callable[[Row], Drawn]]] = [
    (("history", "human_ref_A", "human_ref_B", "labels"), compared),
    (("prompt", "chosen", "rejected"), preferred),
    (("chosen", "rejected"), transcripts),
    (("instruction", "output"), instructed),
    (("instruction", "response"), instructed),
]
"""What a source may hold, and how it is read; the first whose columns are there counts."""

TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):[ \t]*")


def last_reply(transcript: Any) -> tuple[str, str]:
    """A conversation up to its last reply, and that reply."""
    if not isinstance(transcript, str):
        raise Unusable("reply is no text")
    before, mark, reply = transcript.rpartition("\n\nAssistant:")
    if not mark:
        raise Unusable("no reply of an Assistant")
    return before, reply


def user_input(prompt: Any) -> Any:
    """A prompt of the form "Human: ... Assistant:" as what the user says. Earlier turns stay in it, with the names of
    conversations.text, so that prompt and reply together are one transcript."""
    if not isinstance(prompt, str) or not re.match(r"\s*Human:", prompt):
        return prompt
    pieces = TURN.split(prompt.strip())[1:]
    turns = [(who, said.strip()) for who, said in zip(pieces[::2], pieces[1::2], strict=True)]
    if turns[-1] == ("Assistant", ""):
        turns.pop()
    if not turns or turns[-1][0] != "Human":
        raise Unusable("the last turn is not the user's")
    told = "\n\n".join(f"{'User' if who == 'Human' else who}: {said}" for who, said in turns)
    return told.removeprefix("User:").strip()
