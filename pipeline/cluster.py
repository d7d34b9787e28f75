"""Actors on a Ray cluster, each with its model loaded once, that take pieces of work one after another."""

import gc
import logging
import os
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from pipeline.config import Ray
from pipeline.errors import UserError, needs
from pipeline.locks import Taken

log = logging.getLogger("gristmill")

Item = TypeVar("Item")
Made = TypeVar("Made")
Start = Callable[[], Callable[[Item], Made]]
"""Called once by each actor; what it gives makes something of an item. What that holds open is closed with it."""


def over(settings: Ray, start: Start[Item, Made], items: Sequence[Item]) -> Iterator[tuple[Item, Made]]:
    """Each item with what actors make of it, as it is done. An item whose actor died goes to another one."""
    with actors(settings, start, len(items)) as found:
        yield from found.over(items)


@contextmanager
def actors(settings: Ray, start: Start[Item, Made], most: int) -> Iterator["Actors[Item, Made]"]:
    """At most so many actors, as long as the block lasts."""
    ray = needs("ray", "ray")
    with connected(ray, settings):
        found = Actors(ray, settings, start, n_actors(ray.nodes(), settings, most))
        yield found
        found.end()


# -- in the actor's process -------------------------------------------------------------------------------------------


class Reply(NamedTuple):
    """What an actor says of a piece of work."""

    made: Any
    error: UserError | None
    said: list[tuple[int, str]]
    """Lines of its log: level and words."""


class Worker:
    """An actor. It is told where and with what environment to work before anything that looks at these is imported."""

    def __init__(self, folder: str, environment: Mapping[str, str]) -> None:
        os.environ.update(environment)
        self.folder, self.said = folder, Said()
        log.setLevel(logging.INFO)
        log.handlers = [self.said]

    def begin(self, start: Start[Any, Any]) -> Reply:
        """Load what all items need."""

        def load() -> None:
            if not Path(self.folder).is_dir():
                raise UserError(
                    f"ray: {self.folder}, where this command was started, does not exist on {socket.gethostname()};"
                    " all machines of the cluster must share it"
                )
            os.chdir(self.folder)
            self.work = start()

        return self.reply(load)

    def do(self, item: Any) -> Reply:
        """What is made of an item."""
        self.said.setLevel(logging.WARNING)  # how far the work is, the driver tells
        return self.reply(lambda: patient(self.work, item))

    def end(self) -> None:
        """Let go of everything, so that files and processes that the work holds are closed."""
        del self.work
        gc.collect()

    def reply(self, work: Callable[[], Any]) -> Reply:
        """What work makes, and the log meanwhile; what the user can mend is handed back, without a traceback."""
        made, error = None, None
        try:
            made = work()
        except UserError as complaint:
            error = complaint.with_traceback(None)
        return Reply(made, error, self.said.taken())


class Said(logging.Handler):
    """Keeps the log until somebody takes it."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line."""
        self.lines.append((record.levelno, record.getMessage()))

    def taken(self) -> list[tuple[int, str]]:
        """What was said since the last time."""
        said, self.lines = self.lines, []
        return said


PATIENCE_S = 60
"""Seconds that a file may be held by an actor that was given up and is being taken down."""


def patient(work: Callable[[Item], Made], item: Item) -> Made:
    """Work on an item that another process may still be about to let go of."""
    until = time.monotonic() + PATIENCE_S
    while True:
        try:
            return work(item)
        except Taken:
            if time.monotonic() > until:
                raise
            time.sleep(1)


# -- in the driver ----------------------------------------------------------------------------------------------------


class Task(NamedTuple):
    """An item, and how often an actor took it."""

    item: Any
    tries: int = 1


WAIT_S = 60
"""Seconds without an actor after which the log says so."""


class Actors(Generic[Item, Made]):
    """Actors at work. One that dies is replaced, and works again once its replacement is placed and has loaded."""

    def __init__(self, ray: Any, settings: Ray, start: Start[Item, Made], n: int) -> None:
        self.ray, self.settings, self.start = ray, settings, ray.put(start)
        self.n = n
        self.idle: deque[Any] = deque()
        self.running: dict[Any, tuple[Any, Task | None]] = {}
        """Actors by what they have been asked for: an item, or (None) to begin."""
        self.n_lost = 0
        """Actors that died while they began, since one last came up."""
        for _ in range(n):
            self.begin()
        log.info("ray: %d actors, %g CPUs and %g GPUs each", n, settings.cpus, settings.gpus)

    def begin(self) -> None:
        """Ask for one more actor, wherever the cluster has room."""
        options = {"num_cpus": self.settings.cpus, "num_gpus": self.settings.gpus, "scheduling_strategy": "SPREAD"}
        one = self.ray.remote(Worker).options(**options).remote(str(Path.cwd()), environment(self.settings))
        self.running[one.begin.remote(self.start)] = one, None

    def wait(self) -> None:
        """Until the first actor is up, which may find the settings wrong."""
        while not self.idle:
            list(self.arrived())

    def over(self, items: Iterable[Item]) -> Iterator[tuple[Item, Made]]:
        """Each item with what is made of it, as it is done. Items are taken as actors become free."""
        source, again, is_over = map(Task, items), deque[Task](), False
        while True:
            while self.idle and (again or not is_over):
                task = again.popleft() if again else next(source, None)
                if task is None:
                    is_over = True
                    break
                self.give(task)
            if is_over and not again and not self.n_at_work:
                return
            for task, reply in self.arrived():
                if reply is None:
                    again.append(task)
                else:
                    yield task.item, reply.made

    @property
    def n_at_work(self) -> int:
        """Items that actors have."""
        return sum(task is not None for _, task in self.running.values())

    def give(self, task: Task) -> None:
        """Let an idle actor work on an item."""
        one = self.idle.popleft()
        self.running[one.do.remote(task.item)] = one, task

    def arrived(self) -> Iterator[tuple[Task, Reply | None]]:
        """What an actor says of an item, or None and the item for its next try; nothing of beginnings."""
        ready, _ = self.ray.wait(list(self.running), num_returns=1, timeout=WAIT_S)
        if not ready and not self.idle and not self.n_at_work:
            log.warning("ray: no actor has come up for %d s; `ray status` says what the cluster waits for", WAIT_S)
        for reference in ready:
            one, task = self.running.pop(reference)
            reply = self.reply_of(reference)
            if isinstance(reply, str):
                next_try = self.lost(one, task, reply)
                if next_try is not None:
                    yield next_try, None
                continue
            self.idle.append(one)
            self.n_lost = 0
            if task is not None:
                yield task, reply

    def reply_of(self, reference: Any) -> Reply | str:
        """What an actor says, or why it says nothing any more."""
        errors = self.ray.exceptions
        died = (errors.RayActorError, errors.WorkerCrashedError, errors.NodeDiedError, errors.ObjectLostError)
        try:
            reply: Reply = self.ray.get(reference)
        except (*died, errors.OutOfMemoryError) as error:
            return type(error).__name__
        except errors.ActorUnschedulableError as error:
            raise UserError(f"ray: an actor cannot be placed ({' '.join(str(error).split())})") from None
        for level, words in reply.said:
            log.log(level, "%s", words)
        if reply.error is not None:
            raise reply.error
        return reply

    def lost(self, one: Any, task: Task | None, why: str) -> Task | None:
        """Replace an actor that is gone; its item for the next try."""
        self.ray.kill(one)  # one that cannot be reached may still be there
        self.n_lost += task is None
        n_times, n_most = (self.n_lost, self.n) if task is None else (task.tries, 1)
        if n_times >= n_most * self.settings.restarts:
            what = "while they began" if task is None else f"at {getattr(task.item, 'name', 'the same piece of work')}"
            raise UserError(
                f"ray: {n_times} actors died {what} ({why}; Ray's logs tell more, memory is the usual reason); what is"
                " done is kept, the same command goes on"
            )
        log.warning("ray: an actor is gone (%s); another one takes its place", why)
        self.begin()
        return None if task is None else task._replace(tries=task.tries + 1)

    def end(self) -> None:
        """Let actors that are idle close what they hold."""
        closing = [one.end.remote() for one in self.idle]
        if closing:
            self.ray.wait(closing, num_returns=len(closing), timeout=WAIT_S)


# -- the cluster ------------------------------------------------------------------------------------------------------

TRIES = 3
"""Times that a cluster on this machine is started: Ray gives its processes 30 s, which a busy machine may exceed."""


@contextmanager
def connected(ray: Any, settings: Ray) -> Iterator[None]:
    """A running cluster, or one on this machine that ends with the block."""
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    logging.getLogger("ray").setLevel(logging.ERROR)
    with redirect_stdout(sys.stderr):  # Ray tells of dead nodes there, and here it is for results
        join(ray, settings.address or os.environ.get("RAY_ADDRESS") or "local")
        try:
            yield
        finally:
            ray.shutdown()


def join(ray: Any, address: str) -> None:
    """Connect to a cluster, or start one."""
    check_listens(address)
    alone = {"include_dashboard": False, "object_store_memory": 2**28} if address == "local" else {}
    why = ""
    for _ in range(TRIES if alone else 1):
        try:
            ray.init(address, log_to_driver=False, configure_logging=False, **alone)
            return
        except Exception as error:  # most of what Ray raises here has no class of its own
            why = " ".join(str(error).split())[:300]
            ray.shutdown()
    what = "no cluster can be started on this machine" if alone else f"{address} cannot be joined"
    raise UserError(f"ray.address: {what} ({why}); start one with ray start --head, and give --ray.address auto")


def check_listens(address: str) -> None:
    """Refuse an address where nobody listens: Ray would try for a long time."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdigit()):
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            f"ray.address: nobody listens at {address} ({error}); give the address that ray start --head told"
        ) from None


def n_actors(nodes: Sequence[Mapping[str, Any]], settings: Ray, most: int) -> int:
    """As many as are asked for, or as the machines have room for; never more than there is work for."""
    there = [node["Resources"] for node in nodes if node["Alive"]]
    room = sum(room_on(resources, settings) for resources in there)
    if not (settings.actors or room):
        raise UserError(
            f"ray: no machine of the cluster has room for an actor with {settings.cpus:g} CPUs and {settings.gpus:g}"
            " GPUs; lower ray.cpus or ray.gpus, or say with ray.actors how many to wait for"
        )
    n_gpus = sum(resources.get("GPU", 0) for resources in there)
    if n_gpus and not settings.gpus:
        log.warning("ray: the cluster has %d GPUs, and actors compute without one; give --ray.gpus 1", n_gpus)
    return min(settings.actors or room, most)


def room_on(resources: Mapping[str, float], settings: Ray) -> int:
    """How many actors one machine has room for."""
    asked = {"CPU": settings.cpus, "GPU": settings.gpus}
    return min(int(resources.get(name, 0) / each + 1e-6) for name, each in asked.items() if each)


PASSED = ("AWS_", "AZURE_", "GOOGLE_", "HF_", "TRANSFORMERS_", "VLLM_")
"""Beginnings of the names of environment variables that actors work with: where models and corpora are, and the keys
to them."""


def environment(settings: Ray) -> dict[str, str]:
    """What actors get of this process's environment: as an argument, for Ray writes its own runtime_env to logs."""
    own = {name: value for name, value in os.environ.items() if name.startswith(PASSED)}
    return {**own, "OMP_NUM_THREADS": str(max(1, int(settings.cpus)))}
