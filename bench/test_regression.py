"""`pytest bench --base REF`: no op may be slower than at REF. See regression.py for the rule."""

import statistics

import pytest
from base import IncomparableError, build
from regression import OPS, gate, slower, start


@pytest.fixture(scope="session")
def tree(request):
    return build(request.config.getoption("--base"))


@pytest.fixture(scope="session")
def base(tree):
    with start(tree) as process:
        yield process


@pytest.fixture(scope="session")
def compared():
    """The ops that could be compared."""
    return []


@pytest.mark.parametrize("op", OPS)
def test_no_slower_than_the_base(op, base, tree, benchmark, request, compared):
    option = request.config.getoption
    threshold = option("--threshold")
    benchmark.group = op
    try:
        ratios, call = gate(op, base, lambda: start(tree), threshold, op in option("--slow-op"))
    except IncomparableError as why:
        pytest.skip(f"not comparable with {why}")
    benchmark.extra_info["ours_over_base"] = ratios
    benchmark.pedantic(call, rounds=5, warmup_rounds=1)
    compared.append(op)
    assert not slower(ratios, threshold), (
        f"{op} takes {statistics.median(ratios):.2f} times as long as at {base.name}, above "
        f"{threshold}: the median of {[round(r, 3) for r in ratios]}"
    )


def test_most_ops_were_compared(compared):
    """A base that shares few ops with this commit is no base."""
    assert 2 * len(compared) > len(OPS), f"compared: {', '.join(compared) or 'none'}"
