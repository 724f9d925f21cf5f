"""Options of the regression gate."""

from regression import SLOWDOWN, THRESHOLD


def pytest_addoption(parser):
    group = parser.getgroup("regression gate")
    group.addoption("--base", default="HEAD~1", help="commit to compare with")
    group.addoption("--threshold", type=float, default=THRESHOLD, help="alarm above this ratio")
    group.addoption(
        "--slow-op", action="append", default=[],
        help=f"slow this op down by {SLOWDOWN - 1:.0%}, to see that the gate notices (repeatable)",
    )  # fmt: skip
