"""A process that has everything imported and runs the real command in forked children, which come to harm as told.

One JSON object a line on stdin: args, and what is to happen. Answers on stdout: first the child's pid, then how it
ended."""

import contextlib
import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir")


def main() -> None:
    import transformers.models.bert.modeling_bert  # noqa: F401

    from pipeline import cli, filter, label, rate, report, score, summary, train, verify  # noqa: F401
    from pipeline.engines import openai  # noqa: F401

    for line in sys.stdin:
        job = json.loads(line)
        file = tempfile.TemporaryFile
        with file("w+") as out, file("w+") as err, file("w+") as counted:
            child = os.fork()
            if child == 0:
                os.setsid()
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                run(job, counted)
            say({"pid": child})
            _, status = os.waitpid(child, 0)
            code = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
            out.seek(0), err.seek(0), counted.seek(0)
            say({"code": code, "stdout": out.read(), "stderr": err.read(), "n_changes": int(counted.read() or 0)})


def say(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


def run(job: dict[str, Any], counted: Any) -> None:
    """In the child: the command, with harm."""
    from pipeline import cli

    code: object = 70
    try:
        os.chdir(job["cwd"])
        count = watch(job["folder"], job.get("die_at"), job.get("die_later_s", 0.0))
        if job.get("file_bytes"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_bytes"], job["file_bytes"]))
        if job.get("read_only"):
            make_read_only(job["folder"])
        if job.get("clock"):
            turn_back()
        cli.main(job["args"])
    except SystemExit as end:
        code = end.code
    except BaseException:
        import traceback

        traceback.print_exc()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
        counted.write(str(len(count)))
        counted.flush()
    os._exit(int(code or 0))  # type: ignore[call-overload]


def watch(folder: str, die_at: int | None, later_s: float) -> list[str]:
    """Counts the changes in a folder; kill -9 at one of them, or so many seconds later."""
    seen: list[str] = []
    here = threading.get_ident

    def hook(event: str, args: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if not (writes or event in CHANGES) or not str(args[0]).startswith(folder):
            return
        seen.append(f"{event} {args[0]} {here()}")
        if len(seen) == die_at:
            if not later_s:
                os.kill(os.getpid(), signal.SIGKILL)
            threading.Thread(target=die, args=(later_s,), daemon=True).start()

    sys.addaudithook(hook)
    return seen


def make_read_only(folder: str) -> None:
    """For this process alone, where it is root's, for whom modes say nothing."""
    if os.geteuid() != 0:
        return
    assert ctypes.CDLL(None).unshare(0x20000) == 0, "a mount namespace of its own"
    for mount in (["--make-rprivate", "/"], ["--bind", folder, folder], ["-o", "remount,ro,bind", folder]):
        subprocess.run(["mount", *mount], check=True)


def die(later_s: float) -> None:
    time.sleep(later_s)
    os.kill(os.getpid(), signal.SIGKILL)


def turn_back() -> None:
    """The clock goes back an hour each time that somebody looks."""
    real, looks = time.time, iter(range(10**9))
    time.time = lambda: real() - 3600 * next(looks)
    time.time_ns = lambda: int(time.time() * 1e9)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    main()
