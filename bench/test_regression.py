"""`pytest bench --base REF`: no op may be slower than at REF. See regression.py for the rule."""

import pytest
from base import IncomparableError, build
from regression import OPS, gate, start


@pytest.fixture(scope="session")
def tree(request):
    return build(request.config.getoption("--base"))


@pytest.fixture(scope="session")
def base(tree):
    with start(tree) as process:
        yield process


@pytest.mark.parametrize("op", OPS)
def test_no_slower_than_the_base(op, base, tree, benchmark, request):
    option = request.config.getoption
    threshold = option("--threshold")
    benchmark.group = op
    try:
        ratios, call = gate(op, base, lambda: start(tree), threshold, op in option("--slow-op"))
    except IncomparableError as why:
        pytest.skip(f"not comparable with {why}")
    benchmark.extra_info["ours_over_base"] = ratios
    benchmark.pedantic(call, rounds=5, warmup_rounds=1)
    assert ratios[-1] <= threshold, (
        f"{op} takes {ratios[-1]:.2f} times as long as at {base.name}, all of {len(ratios)} "
        f"measurements above {threshold}: {[round(r, 3) for r in ratios]}"
    )
