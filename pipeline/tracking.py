"""The run folder: what a stage was made from, its result, its metrics."""

import hashlib
import io
import json
import logging
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline import locks, manifest, mirror, places, spread, storage
from pipeline.config import Recipe, load_recipe, to_yaml
from pipeline.errors import UserError, needs
from pipeline.places import Place
from pipeline.storage import read_lines, write_text

log = logging.getLogger("gristmill")


class Result(BaseModel):
    """What a stage reports; written last, so its file says that the stage is finished."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seconds: float


MADE_FROM = {
    "tune": ("corpus", "teacher", "rate", "tune"),
    "rate": ("corpus", "teacher", "rate"),
    "label": ("corpus", "teacher", "label"),
    "train": ("encoder", "train"),
    "score": ("corpus", "score"),
    "cuts": ("cuts",),
    "audit": ("teacher", "audit"),
    "filter": ("filter",),
    "finetune": ("finetune",),
    "prove": ("prove",),
    "prepare": ("align",),
    "actor": ("align", "actor"),
    "reward": ("encoder", "train", "reward"),
    "rl": ("align", "rl"),
}
"""Sections of the recipe that a stage is made from."""
IN_PARTS = ("rate", "label", "score", "audit", "filter", "prove")
"""Stages that several processes can do together, each a part."""

BY_SHARD = ("rate", "label", "score", "filter")
"""Stages that a shard which was added or changed only gives more to do."""

AnyResult = TypeVar("AnyResult", bound=Result)
Step = Callable[[int], None]


class Stage:
    """One stage at work in its folder of the run."""

    def __init__(self, name: str, recipe: Recipe, inputs: dict[str, Any]) -> None:
        self.name, self.recipe, self.inputs = name, recipe, {"format": manifest.FORMAT, **inputs}
        self.folder = recipe.run_folder / name
        self.places = places.elsewhere(recipe, name)
        """Folders or URLs that hold what would be below these names in the stage's folder."""
        self.begin = time.perf_counter()

    def finished(self, kind: type[AnyResult], redo: bool, there: bool, start: bool = True) -> AnyResult | None:
        """The result, if this stage has been done with the same inputs and what it made is still `there`; refuses
        when the inputs changed, unless `redo`. Else the stage starts, or does so later."""
        before = read_json(self.folder / "inputs.json")
        done = read_json(self.folder / "result.json") or read_json(self.part)
        made = done is not None or any(self.part.parent.glob("result.*"))
        made = made or (self.name == "score" and bool(places.names(places.corpus(self.recipe, "score"))))
        if made and not redo and not self.is_only_more():
            self.refuse_changes()
        more_to_ask = done is not None and (done.get("n_not_asked") or (redo and done.get("n_failed")))
        is_lost = done is not None and self.is_lost(redo)
        if done is not None and there and before == self.inputs and not more_to_ask and not is_lost:
            log.info("%s: done already, skipped", self.name)
            return self.read_result(kind, done)
        if start:
            self.start()
        return None

    def is_lost(self, redo: bool) -> bool:
        """Whether something that this stage made is gone, or was cut off and goes too. What has another length and is
        whole was changed by somebody: refused, unless all is made anew."""
        made = manifest.read(self.part.with_name(f"manifest{spread.name(self.recipe.shard)}.json"))
        made = made or manifest.read(self.folder / manifest.FILE) or manifest.EMPTY
        lost = manifest.lost(self.folder, made)
        for path, n_bytes in lost.items():
            where = manifest.locate(self.folder, path, made.places)
            if not (redo or n_bytes is None or manifest.is_cut_off(where)):
                raise UserError(
                    f"{self.name}: {where} has {n_bytes} bytes and was made with {made.files[path].bytes}; put it back"
                    f" or remove it: gristmill verify {self.recipe.run_folder} --remove does, with all that is damaged"
                )
        for path in lost:
            manifest.remove(self.folder, path)
        if lost:
            log.warning("%s: gone, cut off or changed, and made again: %s", self.name, listed(list(lost)))
        return bool(lost)

    def is_only_more(self) -> bool:
        """Whether there are just shards that are new or changed since; says which."""
        before = read_json(self.folder / "inputs.json")
        if self.name not in BY_SHARD or before is None or before == self.inputs:
            return False
        old, new = before.get("shards", {}), self.inputs.get("shards", {})
        if {**before, "shards": new} != self.inputs or old.keys() - new.keys():
            return False
        for what, names in (("new", new.keys() - old.keys()), ("changed", {n for n in old if old[n] != new[n]})):
            if names:
                log.info("%s: %s: %s", self.name, what, listed(sorted(names)))
        return True

    def refuse_changes(self) -> None:
        """Stop where what is there was made from other inputs."""
        before = read_json(self.folder / "inputs.json")
        if before is None or before == self.inputs:
            return
        gone = before.get("shards", {}).keys() - self.inputs.get("shards", {}).keys()
        if gone and {**before, "shards": 0} == {**self.inputs, "shards": 0}:
            raise UserError(
                f"{self.name}: gone since {self.folder} was made: {listed(sorted(gone))}; put back what is gone, or"
                " run again with --redo, which removes what was made of it too"
            )
        raise UserError(
            f"{self.name}: {changes(before, self.inputs)} since {self.folder} was made; run again with --redo to"
            " do it anew (recorded answers are used again), or give another --run-folder"
        )

    def start(self) -> None:
        """From now on what was made before counts no more."""
        mirror.forget(self.folder / "result.json", self.folder / manifest.FILE)
        manifest.begin(self.folder)
        for left in () if self.recipe.shard else self.folder.glob(".*.tmp"):
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
        (self.folder / "result.json").unlink(missing_ok=True)
        if read_json(self.folder / "inputs.json") != self.inputs:
            mirror.forget(self.part.parent)
            shutil.rmtree(self.part.parent, ignore_errors=True)
        write_text(self.folder / "inputs.json", dump(self.inputs))
        write_text(self.folder / "recipe.yaml", to_yaml(self.recipe.model_copy(update={"shard": None})))

    def read_result(self, kind: type[AnyResult], done: dict[str, Any]) -> AnyResult:
        """A stored result, if this version wrote it."""
        try:
            return kind.model_validate(done)
        except ValidationError:
            raise UserError(
                f"{self.folder / 'result.json'} was written by another version; remove it and run the stage again"
            ) from None

    def finish(self, result: AnyResult) -> AnyResult:
        """Write the manifest, the result, then its numbers to the metrics; of one part of the work no numbers."""
        values = result.model_dump(mode="json")
        self.vouch(dump(values))
        if self.recipe.shard:
            write_text(self.part, dump(values))
            return result
        write_text(self.folder / "result.json", dump(values))
        (self.folder / manifest.BEFORE).unlink(missing_ok=True)
        numbers = flatten(values, numbers_only=True)
        line = {"stage": self.name, "time": round(time.time(), 3), **numbers}
        add_line(self.recipe.run_folder / "metrics.jsonl", line)
        if self.recipe.tracking.to:
            from pipeline import dashboards  # it reads what stages left, and so stands above this file

            dashboards.send(self.name, self.recipe, numbers)
        return result

    def vouch(self, result: str) -> None:
        """Write the manifest of what was made, of a part what this process made; and of the result, which comes
        last."""
        known = manifest.known(self.folder)
        if self.recipe.shard:
            own = {*map(str, storage.WRITTEN), *storage.UPLOADED}
            path = self.part.with_name(f"manifest{spread.name(self.recipe.shard)}.json")
            manifest.write(path, manifest.of(self.folder, self.places, known, own))
            return
        made = manifest.of(self.folder, self.places, known)
        raw = result.encode()
        entry = manifest.Entry(len(raw), hashlib.sha256(raw).hexdigest(), "")
        manifest.write(self.folder / manifest.FILE, made._replace(files=made.files | {"result.json": entry}))

    @property
    def part(self) -> Path:
        """The result of the part that this process does; there is none where it does all."""
        return self.folder / "parts" / f"result{spread.name(self.recipe.shard)}.json"

    @property
    def seconds(self) -> float:
        """Seconds since this stage began."""
        return round(time.perf_counter() - self.begin, 3)


def add_line(path: Path, values: dict[str, Any]) -> None:
    """Add a line to a file of JSON lines, below one that a crash cut."""
    with path.open("a+b") as file:
        begin = file.seek(0, io.SEEK_END)
        file.seek(max(0, begin - 1))
        cut = begin > 0 and file.read(1) != b"\n"
        file.write(b"\n" * cut + json.dumps(values).encode() + b"\n")


def read_metrics(run_folder: Path) -> list[dict[str, Any]]:
    """The numbers of every stage that was finished, in that order; a line that was cut by a crash is left out."""
    return read_lines(run_folder / "metrics.jsonl")


@contextmanager
def stage(name: str, recipe: Recipe, inputs: dict[str, Any]) -> Iterator[Stage]:
    """Work on one stage of a run, alone; on a part of it, beside those at work on the others."""
    if name not in IN_PARTS:
        spread.by_one(recipe, name)
    work = Stage(name, recipe, inputs)
    check_apart(recipe)
    if recipe.tracking.to:
        needs(recipe.tracking.to, recipe.tracking.to)
    try:
        work.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"run_folder: {work.folder} cannot be made ({error.strerror}); give another --run-folder"
        ) from None
    check_format(work.folder)
    refusal = f"{name}: another process is at work in {work.folder}; wait for it or stop it"
    with ExitStack() as held:
        held.enter_context(locks.held(work.folder / ".lock", refusal, shared=recipe.shard is not None))
        if recipe.shard:
            own = work.folder / f".lock{spread.name(recipe.shard)}"
            held.enter_context(
                locks.held(own, f"{name}: another process is at work on part {recipe.shard}; wait for it")
            )
        yield work


def check_apart(recipe: Recipe) -> None:
    """Refuse a run folder inside the corpus, where its files would be read as documents, and a corpus inside it."""
    corpus, run = Path(recipe.corpus.path or "").resolve(), recipe.run_folder.resolve()
    inside = corpus.is_relative_to(run) or (run.is_relative_to(corpus) and corpus.is_dir())
    if recipe.corpus.path and inside:
        raise UserError(
            f"run_folder: {recipe.run_folder} and corpus.path {recipe.corpus.path} overlap; keep them apart"
        )


def upstream(path: Path | None, recipe: Recipe, inside: str, stage_name: str) -> Path:
    """What an earlier stage left in the run folder, or what was named instead of it."""
    if path is not None:
        if not path.exists():
            raise UserError(f"{stage_name}: {path} does not exist")
        return path
    made, folder = recipe.run_folder / inside, recipe.run_folder / inside.split("/")[0]
    if not (folder / "result.json").exists():
        raise UserError(f"{stage_name}: {folder} is not finished; run gristmill {folder.name} first")
    check_format(folder)
    warn_of_other_settings(recipe, folder, stage_name)
    return made


def corpus_of(stage_name: str, recipe: Recipe, reader: str, named: Path | None = None) -> Place:
    """The corpus that an earlier stage left, wherever it put it, or what was named instead of it."""
    if named is None:
        upstream(None, recipe, f"{stage_name}/{places.CORPORA[stage_name]}", reader)
        return places.made(recipe, stage_name)
    place = places.of(named, reader)
    if not places.is_there(place):
        raise UserError(f"{reader}: {place} does not exist")
    return place


def check_format(folder: Path) -> None:
    """Refuse a stage's folder that was written in another form."""
    said = read_json(folder / "inputs.json")
    if said is not None:
        manifest.check_format(said, folder)


def warn_of_other_settings(recipe: Recipe, folder: Path, stage_name: str) -> None:
    """Say so when an earlier stage was made with other settings than those given now."""
    made = load_recipe(folder / "recipe.yaml", {})
    for section in MADE_FROM[folder.name]:
        before, now = getattr(made, section).identity(), getattr(recipe, section).identity()
        given = getattr(recipe, section).model_fields_set & now.keys()
        if any(before[name] != now[name] for name in given):
            told = changes({name: before[name] for name in given}, {name: now[name] for name in given})
            log.warning("%s: %s.%s since %s was made; its result is used as it is", stage_name, section, told, folder)


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON file of ours; None if there is none."""
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))  # type: ignore[no-any-return]
    except ValueError:
        raise UserError(f"{path} is damaged; remove it and run the stage again") from None


def dump(values: dict[str, Any]) -> str:
    """JSON for files that people read too."""
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def listed(names: Sequence[str]) -> str:
    """A few names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def changes(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What differs between two sets of inputs, in a few words."""
    old, new = flatten(before), flatten(now)
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    told = [f"{name} changed from {old.get(name)!r} to {new.get(name)!r}" for name in names[:3]]
    return ", ".join(told) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def flatten(values: dict[str, Any], prefix: str = "", numbers_only: bool = False) -> dict[str, Any]:
    """Nested dicts as one, with dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.", numbers_only)
        elif not numbers_only or (isinstance(value, int | float) and not isinstance(value, bool)):
            flat[prefix + name] = value
    return flat


@contextmanager
def progress(
    name: str,
    total: int | None,
    beside: Callable[[float], str] = lambda _: "",
    unit: str = "documents",
    already: int = 0,
) -> Iterator[Step]:
    """Counts documents, or another unit: a bar with docs/s and time left on a terminal, a line every 15 s elsewhere;
    `beside` adds to it, given the seconds so far. What was `already` done before is no part of the speed."""
    if sys.stderr.isatty():
        with progress_bar(name, total, beside, unit, already) as step:
            yield step
        return
    begin = said = time.perf_counter()
    done = already

    def advance(n: int) -> None:
        nonlocal done, said
        done += n
        now = time.perf_counter()
        if now - said >= EVERY_S:
            said = now
            log.info("%s: %s", name, pace(done, total, now - begin, beside(now - begin), unit, already))

    yield advance


EVERY_S = 15
"""Seconds between lines of progress."""
SHORT = {"documents": "docs"}
"""Units by what they are called in a speed."""
SLOW = 0.1
"""Units a second below which seconds for each are told."""


def pace(
    done: int, total: int | None, seconds: float, beside: str = "", unit: str = "documents", already: int = 0
) -> str:
    """How far and how fast, in words."""
    speed = (done - already) / max(seconds, 1e-9)
    told = [f"{done}{f' of {total}' if total else ''} {unit}", how_fast(speed, unit), beside]
    left = f"{(total - done) / speed:.0f} s left" if total and speed else ""
    return ", ".join(filter(None, [*told, left]))


def how_fast(speed: float, unit: str) -> str:
    """So many a second, or so many seconds for each where that is a number one can picture."""
    return f"{1 / speed:.0f} s each" if 0 < speed < SLOW else f"{speed:.1f} {SHORT.get(unit, unit)}/s"


@contextmanager
def progress_bar(
    name: str, total: int | None, beside: Callable[[float], str], unit: str, already: int
) -> Iterator[Step]:
    """A bar on the terminal, below the one of the work that it is part of."""
    begin = time.perf_counter()
    with bars() as shown:
        counted = f"/{total} {unit}" if total else f" {unit}"
        task = shown.add_task(name, total=total, completed=already, counted=counted, speed="")
        done = already

        def advance(n: int) -> None:
            nonlocal done
            done += n
            seconds = max(time.perf_counter() - begin, 1e-9)
            told = ", ".join(filter(None, [how_fast((done - already) / seconds, unit), beside(seconds)]))
            shown.update(task, advance=n, speed=told)

        try:
            yield advance
        finally:
            if len(shown.tasks) > 1:
                shown.remove_task(task)


SHOWN: list[Any] = []
"""The bars on the terminal, while there are some: it holds one such display at a time."""


@contextmanager
def bars() -> Iterator[Any]:
    """What bars stand in: those of the work around, or else a display of their own."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    if SHOWN:
        yield SHOWN[0]
        return
    counted = TextColumn("{task.completed}{task.fields[counted]}")
    columns = (TextColumn("{task.description}"), BarColumn(), counted, TextColumn("{task.fields[speed]}"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as shown:
        SHOWN.append(shown)
        try:
            yield shown
        finally:
            SHOWN.clear()
