"""An earlier commit measured beside this one: built in its own tree, run in its own process.

The process runs this commit's cases on that commit's package, and times turns when it is asked to:
so both commits are measured in one run, by one clock rule, in alternation.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
COMPILED = ("csrc", "include", "CMakeLists.txt", "setup.py")  # what the module is built from


def build(ref: str, folder: Path = ROOT / "build" / "base") -> Path:
    """Check out a commit and build it; returns its tree.

    Where nothing that is compiled differs, this checkout's module is copied instead; what was
    built before is kept.
    """

    def git(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        words = ("git", "-C", str(ROOT), *words)
        return subprocess.run(words, capture_output=True, text=True, check=check)

    sha = git("rev-parse", "--short", f"{ref}^{{commit}}").stdout.strip()
    tree = folder / sha
    if not (tree / "setup.py").is_file():
        git("worktree", "prune")
        git("worktree", "add", "--detach", str(tree), sha)
    modules = list((ROOT / "knnfast").glob("_C*.so"))
    same = git("diff", "--quiet", sha, "--", *COMPILED, check=False).returncode == 0
    if same and modules:
        for module in modules:
            shutil.copy2(module, tree / "knnfast" / module.name)
    elif not list((tree / "knnfast").glob("_C*.so")):
        words = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        subprocess.run(words, check=True, cwd=tree, stdout=subprocess.DEVNULL)
    return tree


class IncomparableError(Exception):
    """The base cannot run the case: it lacks the op, or takes it in another form."""


# What tells that. Anything else (a crash, no memory) is a failure.
FOREIGN = (ImportError, AttributeError, LookupError, TypeError, ValueError, NotImplementedError)


class Base:
    """The process of a built tree; goes from case to case with its caller.

    Its methods raise IncomparableError where the base has no such op, and RuntimeError when it
    fails, with its own error. `clock` is "wall" or "cpu".
    """

    def __init__(
        self, tree: Path, device: str = "cpu", threads: int | None = None, clock: str = "wall"
    ) -> None:
        self.name = f"base {tree.name}"
        words = [sys.executable, str(Path(__file__).resolve()), "--device", device]
        words += ["--threads", str(threads or os.cpu_count()), "--clock", clock]
        self.process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tree,
            env=os.environ | {"PYTHONPATH": str(tree)},
        )  # fmt: skip

    def __enter__(self) -> Base:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(timeout=60)

    def ask(self, **request: Any) -> Any:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with exit code {self.process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            kind = IncomparableError if answer["foreign"] else RuntimeError
            raise kind(f"{self.name}: {answer['error']}")
        return answer["value"]

    def open(self, op: str, shape: str) -> None:
        """The cases of one op at one shape; `advance` goes to the first."""
        self.ask(verb="open", op=op, shape=shape)

    def advance(self) -> None:
        """On to the next case."""
        self.ask(verb="advance")

    def contender(self, backend: str) -> Remote:
        """The current case's backend, to be timed in alternation."""
        return Remote(self, backend)


class Remote:
    """A contender in the base's process."""

    def __init__(self, base: Base, backend: str) -> None:
        self.base, self.backend = base, backend

    def turn(self, seconds: float) -> list[float]:
        return self.base.ask(verb="turn", backend=self.backend, seconds=seconds)


def serve(device: str, threads: int, clock: str) -> None:
    """In the base's process: its package, this commit's cases and timing."""
    harness = ROOT / "knnfast" / "benchmark"
    spec = importlib.util.spec_from_file_location(
        "knnfast.benchmark", harness / "__init__.py", submodule_search_locations=[str(harness)]
    )
    sys.modules["knnfast.benchmark"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["knnfast.benchmark"])
    import torch
    from cases import cases

    from knnfast import _C
    from knnfast.benchmark.timing import CLOCKS, Local, keep_freed_memory

    keep_freed_memory()  # as the caller does
    _C.set_num_threads(threads)
    torch.set_num_threads(threads)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a case prints is no answer
    for line in sys.stdin:
        request = json.loads(line)
        value = None
        try:
            if request["verb"] == "open":
                case = None
                todo = cases(request["op"], request["shape"], device)
            elif request["verb"] == "advance":
                case = next(todo)
                # As the caller does: what judging frees changes how the allocator serves later.
                case.judge(next(iter(case.ours.values()))())
            else:
                local = Local(case.ours[request["backend"]], case.cuda, CLOCKS[clock])
                value = local.turn(request["seconds"])
            answer = {"value": value}
        except Exception as error:  # whatever it is, the caller hears it
            text = f"{type(error).__name__}: {error}"
            answer = {"error": text, "foreign": isinstance(error, FOREIGN)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", required=True)
    parser.add_argument("--clock", required=True)
    parser.add_argument("--threads", type=int, required=True)
    serve(**vars(parser.parse_args()))
