"""An earlier commit measured beside this one: built in its own tree, run in its own process.

The process runs this commit's cases on that commit's package, and times turns when it is asked to:
so both commits are measured in one run, by one clock rule, in alternation.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


class Base:
    """One op and shape of the built tree; advances from case to case with the caller.

    Args:
        tree: what `build` returned.
        op, shape, device, threads: as in run.py.
    """

    def __init__(self, tree: Path, op: str, shape: str, device: str, threads: int) -> None:
        self.name = f"base {tree.name}"
        words = ["--op", op, "--shape", shape, "--device", device, "--threads", str(threads)]
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), *words],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tree,
            env=os.environ | {"PYTHONPATH": str(tree)},
        )  # fmt: skip

    @staticmethod
    def build(ref: str) -> Path:
        """Check out and build a commit under build/base; what is built already is kept."""
        git = ["git", "-C", str(ROOT)]
        sha = subprocess.run(
            [*git, "rev-parse", "--short", f"{ref}^{{commit}}"],
            capture_output=True, text=True, check=True,
        ).stdout.strip()  # fmt: skip
        tree = ROOT / "build" / "base" / sha
        if not tree.exists():
            subprocess.run([*git, "worktree", "add", "-q", "--detach", str(tree), sha], check=True)
        words = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        subprocess.run(words, check=True, cwd=tree, stdout=subprocess.DEVNULL)
        return tree

    def __enter__(self) -> Base:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)

    def ask(self, **request: Any) -> Any:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with exit code {self.process.wait()}")
        return json.loads(line)

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


def serve(op: str, shape: str, device: str, threads: int) -> None:
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
    from knnfast.benchmark.timing import Local

    _C.set_num_threads(threads)
    torch.set_num_threads(threads)
    todo = cases(op, shape, device)
    case = None
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a case prints is no answer
    for line in sys.stdin:
        request = json.loads(line)
        answer = None
        if request["verb"] == "advance":
            case = next(todo)
        else:
            answer = Local(case.ours[request["backend"]], case.cuda).turn(request["seconds"])
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("op", "shape", "device"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--threads", type=int, required=True)
    serve(**vars(parser.parse_args()))
