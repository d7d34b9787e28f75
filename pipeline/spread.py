"""Work spread over processes: the part of a stage that --shard i/n gives to this one, and actors of a cluster."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from pipeline.config import Recipe
from pipeline.errors import SettingsError

Item = TypeVar("Item")
Made = TypeVar("Made")


def part(items: Sequence[Item], shard: str | None) -> list[Item]:
    """The i-th of n parts of some items, every n-th of them; all without a shard."""
    if shard is None:
        return list(items)
    i, n = numbers(shard)
    return list(items[i - 1 :: n])


def numbers(shard: str) -> tuple[int, int]:
    """i and n of i/n."""
    i, n = map(int, shard.split("/"))
    if i > n:
        raise SettingsError(f"--shard: {shard} is not one of {n} parts; count from 1/{n} to {n}/{n}")
    return i, n


def by_one(recipe: Recipe, work: str) -> None:
    """Refuse a part of what one process does as a whole."""
    if recipe.shard:
        raise SettingsError(f"{work}: is done by one process; leave out --shard")


def name(shard: str | None) -> str:
    """A part in the names of its files; empty where there are no parts."""
    return "" if shard is None else f".{shard.replace('/', '-of-')}"


def over(
    recipe: Recipe, start: Callable[[], Callable[[Item], Made]], items: Sequence[Item]
) -> Iterator[tuple[Item, Made]]:
    """Each item with what is made of it, as it is done: here one after another, or by the actors of a cluster. `start`
    is called once by whoever works, and loads what all items need."""
    if recipe.engine == "ray" and items:
        from pipeline import cluster

        yield from cluster.over(recipe.ray, start, items)
        return
    work = start() if items else None
    for item in items:
        assert work is not None
        yield item, work(item)
