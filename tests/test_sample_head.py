"""sample_head: the dense step's tokens from the rows that need logits alone."""

import pytest
import torch
from transition_helpers import SCHEDULES, NoHostReads, levels, weights_of, within_twice

from knnfast import ops, reference
from knnfast.ops._checks import DTYPE_CODES, pointer

# Outputs hold NaN before a kernel writes them. torch's own CUDA ops warn when that mode finds them
# in another order than they promise.
pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.filterwarnings("ignore:.*does not have a deterministic implementation:UserWarning"),
]


def make(K, B=2, L=40, D=24, dtype=torch.float32):
    features = torch.randn(B, L, D).to(dtype)
    null = torch.randn(B, L, D).to(dtype)
    weight, bias = (torch.randn(K, D) * 0.5).to(dtype), torch.randn(K).to(dtype)
    x_t = torch.where(torch.rand(B, L) < 0.5, K, torch.randint(0, K, (B, L)))
    return features, null, weight, bias, x_t


@pytest.mark.isa
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("rule", [{}, {"guidance": 2.5}, {"top_r": 0.8, "top_k": 9}])
@pytest.mark.parametrize("K", [2, 100, 512])
def test_matches_reference_and_dense(name, rule, K, device):
    features, null, weight, bias, x_t = (v.to(device) for v in make(K))
    if "guidance" in rule:
        rule = rule | {"null_features": null}
    for t, s in [(100, 96), (50, 49), (7, 0)]:
        weights = weights_of(name, K, t, s).to(device)
        got = ops.sample_head(features, weight, bias, x_t, weights, seed=9, **rule)
        expected = reference.sample_head(features, weight, bias, x_t, weights, seed=9, **rule)
        assert (got != expected).double().mean() < 2e-2
        dense = {k: v for k, v in rule.items() if k != "null_features"}
        if "null_features" in rule:
            dense["null_logits"] = torch.nn.functional.linear(null, weight, bias)
        logits = torch.nn.functional.linear(features, weight, bias)
        assert (got != ops.transition_step(logits, x_t, weights, seed=9, **dense)).sum() <= 1


@pytest.mark.isa
@pytest.mark.parametrize("name", SCHEDULES)
def test_equals_dense_on_identical_logits(name, device):
    """A head that hands its rows on makes both forms see the same bits: every token equal."""
    K = 65
    logits, null = (torch.randn(4, 200, K).to(device) * 4 for _ in range(2))
    x_t = torch.where(torch.rand(4, 200) < 0.5, K, torch.randint(0, K, (4, 200))).to(device)
    for t, s in [(100, 60), (30, 29), (1, 0)]:
        weights = weights_of(name, K, t, s).to(device)
        for rule in ({}, {"top_r": 0.7, "temperature": 0.8}, {"guidance": 2.0}):
            guided = "guidance" in rule
            dense = ops.transition_step(
                logits, x_t, weights, seed=2, null_logits=null if guided else None, **rule
            )
            sparse = ops.sample_head(
                logits, lambda rows: rows.clone(), None, x_t, weights, seed=2, num_codes=K,
                null_features=null if guided else None, **rule,
            )  # fmt: skip
            assert torch.equal(dense, sparse)


def test_rows_are_the_share_that_the_mathematics_says():
    """vq_diffusion, 100 steps: 2.9 % of rows on average; mask: 1 %."""
    K, L = 64, 4096
    for name, low, high in [
        ("vq_diffusion", 0.026, 0.032), ("mask_replace", 0.06, 0.08), ("mask", 0.009, 0.011)
    ]:  # fmt: skip
        schedule = levels(name, K)
        x = reference.sample_prior(schedule, 100, K, (1, L), seed=0)
        rows = 0

        def head(features):
            nonlocal rows
            rows += len(features)
            return torch.zeros(len(features), K)

        for t in range(100, 0, -1):
            weights = reference.transition_weights(schedule, t, t - 1, K)
            x = ops.sample_head(torch.zeros(1, L, 1), head, None, x, weights, seed=0, num_codes=K)
        assert low < rows / (100 * L) < high


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy runs both sides of tl.where
@pytest.mark.parametrize("strided", [False, True])
def test_triton_matches_reference(strided):
    if torch.cuda.is_available():
        pytest.skip("compiled in this process; the gpu tests cover it")
    from knnfast.kernels.sample_head import launch_sample_head

    features, null, weight, bias, x_t = make(21, B=1, L=19)
    if strided:
        weight, bias = weight.T.contiguous().T, torch.stack([bias, -bias], 1)[:, 0]
    weights = weights_of("mask_replace", 21, 100, 60)
    index, key = torch.tensor([5]), torch.tensor([8])
    with NoHostReads({"cpu"}):
        got = launch_sample_head(
            features, null, weight, bias, x_t, weights, index, key, 2.0, 1.0, 1.0, 0
        )
    expected = reference.sample_head(
        features, weight, bias, x_t, weights, seed=8, image_indices=index, null_features=null,
        guidance=2.0,
    )  # fmt: skip
    assert torch.equal(got, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_cuda_equals_cuda_dense(dtype):
    features, _, weight, bias, x_t = (v.cuda() for v in make(513, L=256, dtype=dtype))
    weights = weights_of("mask_replace", 513, 100, 60).cuda()
    got = ops.sample_head(features, weight, bias, x_t, weights, seed=8)
    logits = torch.nn.functional.linear(features.float(), weight.float(), bias.float())
    dense = ops.transition_step(logits, x_t, weights, seed=8)
    assert (got != dense).sum() <= 2


def test_large_means_and_strided_inputs(device):
    """Features far from 0 and a bias, every other one of wider tensors; tokens transposed."""
    features, null, weight, bias, x_t = (v.to(device) for v in make(100, L=80))
    wide = torch.stack([features + 100.0, null + 100.0], 2).flatten(1, 2)  # [B, 2 L, D]
    far, far_null = wide[:, ::2], wide[:, 1::2]
    turned = x_t.T.contiguous().T
    spread = torch.stack([bias, bias.flip(0)], 1)[:, 0]
    assert not far.is_contiguous()
    assert not turned.is_contiguous()
    assert not spread.is_contiguous()
    weights = weights_of("mask_replace", 100, 80, 30).to(device)
    rule = {"null_features": far_null, "guidance": 2.0}
    got = ops.sample_head(far, weight, spread, turned, weights, seed=4, **rule)
    expected = reference.sample_head(far, weight, bias, x_t, weights, seed=4, **rule)
    assert (got != expected).double().mean() < 2e-2
    rule["null_features"] = far_null.contiguous()
    dense = ops.sample_head(far.contiguous(), weight, bias, x_t, weights, seed=4, **rule)
    assert torch.equal(got, dense)


@pytest.mark.isa
def test_rows_do_not_depend_on_each_other():
    """A token is the same to the bit whatever else is drawn: drawn alone, and among many."""
    features, null, weight, bias, x_t = make(300, B=4, L=50, D=130)
    weights = weights_of("mask_replace", 300, 60, 20)
    whole = ops.sample_head(
        features, weight, bias, x_t, weights, seed=1, null_features=null, guidance=3.0
    )
    for b in range(4):
        alone = ops.sample_head(
            features[b : b + 1], weight, bias, x_t[b : b + 1], weights, seed=1,
            image_indices=torch.tensor([b]), null_features=null[b : b + 1], guidance=3.0,
        )  # fmt: skip
        assert torch.equal(alone[0], whole[b])


@pytest.mark.isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("K", "D"), [(2, 1), (47, 33), (49, 16), (512, 257), (2887, 15)])
def test_logits_within_twice(K, D, dtype):
    """The head's own product against FP64, at most twice the error of torch's linear layer."""
    from knnfast import _C

    f, weight, bias = (torch.randn(*s).to(dtype) for s in ((19, D), (K, D), (K,)))
    plain = torch.nn.functional.linear(f, weight, bias)
    exact = f.double() @ weight.double().T + bias.double()
    for rows in (torch.arange(19), torch.tensor([7]), torch.tensor([0, 3, 4, 9, 11, 12, 13, 17])):
        got = torch.empty(len(rows), K)
        _C.head_rows(DTYPE_CODES[dtype], D, K, *map(pointer, (f, rows)), len(rows),
                     *map(pointer, (weight, bias, got)))  # fmt: skip
        within_twice(got, plain[rows], exact[rows], dtype)


def test_compile_and_export(device):
    features, null, weight, bias, x_t = (v.to(device) for v in make(16))
    weights, key = weights_of("mask_replace", 16, 50, 25).to(device), torch.tensor([3]).to(device)
    args = features, null, weight, bias, x_t, weights, torch.arange(2).to(device), key
    torch.library.opcheck(torch.ops.knnfast.sample_head.default, (*args, 2.0, 1.0, 1.0, 0))

    class Head(torch.nn.Module):
        def forward(self, features, null, weight, bias, x_t, weights, key):
            return ops.sample_head(
                features * 1.0, weight, bias, x_t, weights, seed=key, null_features=null,
                guidance=2.0,
            )  # fmt: skip

    args = features, null, weight, bias, x_t, weights, key
    eager = Head()(*args)
    assert torch.equal(torch.compile(Head(), fullgraph=True, backend="aot_eager")(*args), eager)
    assert torch.equal(torch.export.export(Head(), args).module()(*args), eager)
    with torch.autocast(device, torch.bfloat16):  # the types given are the types used
        assert torch.equal(Head()(*args), eager)


def test_rejects():
    features, null, weight, bias, x_t = make(8)
    weights = weights_of("mask", 8, 50, 25)
    with pytest.raises(ValueError, match="weight"):
        ops.sample_head(features, weight[:, :-1], bias, x_t, weights, seed=0)
    with pytest.raises(ValueError, match="bias"):
        ops.sample_head(features, weight, bias[:-1], x_t, weights, seed=0)
    with pytest.raises(TypeError, match="bias"):
        ops.sample_head(features, weight, bias.half(), x_t, weights, seed=0)
    with pytest.raises(ValueError, match="bias: must be on cpu, got meta"):
        ops.sample_head(features, weight, bias.to("meta"), x_t, weights, seed=0)
    with pytest.raises(ValueError, match="at least 2 classes, got 1"):
        ops.sample_head(features, weight[:1], bias[:1], x_t, weights, seed=0)
    with pytest.raises(ValueError, match="null_features"):
        ops.sample_head(features, weight, bias, x_t, weights, seed=0, null_features=null[:1])
    with pytest.raises(ValueError, match=r"guidance: must be 1 without null_features, got 2\.0"):
        ops.sample_head(features, weight, bias, x_t, weights, seed=0, guidance=2.0)
    with pytest.raises(ValueError, match="num_codes"):
        ops.sample_head(features, lambda r: r, None, x_t, weights, seed=0)
    with pytest.raises(TypeError, match="num_codes: must be an integer, got 'a'"):
        ops.sample_head(features, lambda r: r, None, x_t, weights, seed=0, num_codes="a")
    with pytest.raises(TypeError, match="features"):
        ops.sample_head(features.double(), weight, bias, x_t, weights, seed=0)


def in_one_row(kind):
    """Inputs whose row [0, 2] alone, drawn as all are, has bad logits."""
    features, null, weight, bias, x_t = make(8, B=1, L=5)
    x_t[:] = 8
    (null if kind == "null" else features)[0, 2, 3] = float("inf" if kind == "inf" else "nan")
    return features, null, weight, bias, x_t, weights_of("mask", 8, 50, 0)


@pytest.mark.parametrize("kind", ["nan", "inf", "null"])
def test_a_bad_row_raises(kind):
    features, null, weight, bias, x_t, weights = in_one_row(kind)
    rule = {"null_features": null, "guidance": 2.0, "num_codes": 8, "seed": 0}
    for head in ((weight, bias), (lambda rows: rows @ weight.T, None)):
        with pytest.raises(ValueError, match="no finite class in 1 of the rows"):
            ops.sample_head(features, *head, x_t, weights, **rule)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's of NaN
@pytest.mark.parametrize("kind", ["nan", "inf", "null"])
def test_triton_marks_a_bad_row(kind):
    if torch.cuda.is_available():
        pytest.skip("compiled in this process; the gpu tests cover it")
    from knnfast.kernels.sample_head import launch_sample_head

    features, null, weight, bias, x_t, weights = in_one_row(kind)
    index, key = torch.tensor([0]), torch.tensor([0])
    got = launch_sample_head(
        features, null, weight, bias, x_t, weights, index, key, 2.0, 1.0, 1.0, 0
    )[0]
    assert int(got[2]) == -1
    assert ((got >= 0) & (got < 8)).sum() == 4


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0)])
def test_empty(shape, device):
    features = torch.zeros(*shape, 24, device=device)
    x_t = torch.zeros(shape, dtype=torch.int64, device=device)
    weight, weights = torch.zeros(8, 24, device=device), weights_of("mask", 8, 50, 25).to(device)
    for head in (weight, lambda rows: rows @ weight.T):
        x_s = ops.sample_head(features, head, None, x_t, weights, seed=0, num_codes=8)
        assert x_s.shape == shape
        assert x_s.device == x_t.device


@pytest.mark.isa
def test_no_features():
    """Logits of the bias alone, not of what the scratch held."""
    bias, x_t = torch.randn(100), torch.full((1, 40), 100)
    weights = weights_of("mask", 100, 50, 0)
    ops.sample_head(torch.ones(1, 40, 24), torch.randn(100, 24), bias, x_t, weights, seed=3)
    got = ops.sample_head(torch.zeros(1, 40, 0), torch.zeros(100, 0), bias, x_t, weights, seed=3)
    assert torch.equal(got, ops.transition_step(bias.expand(1, 40, -1), x_t, weights, seed=3))


@pytest.mark.isa
def test_subnormal_numbers_count():
    """Whatever the caller's mode, with which the threads of the pool do not compute."""
    _, _, weight, bias, x_t = make(100)
    args = torch.full((2, 40, 24), 5e-39), weight * 1e38, bias, x_t, weights_of("mask", 100, 50, 0)
    expected = ops.sample_head(*args, seed=3)
    torch.set_flush_denormal(True)
    try:
        assert torch.equal(ops.sample_head(*args, seed=3), expected)
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("token", [-1, 9])
def test_rejects_tokens_out_of_range(token):
    features, _null, weight, bias, x_t = make(8)
    weights = weights_of("mask_replace", 8, 50, 25)
    x_t[0, 1] = token
    for head in ((weight, bias), (lambda rows: rows @ weight.T, None)):
        with pytest.raises(ValueError, match=r"x_t: tokens must be in \[0, 8\]"):
            ops.sample_head(features, *head, x_t, weights, seed=0, num_codes=8)
    rows = torch.arange(x_t.numel())
    with pytest.raises(ValueError, match=r"x_t: tokens must be in \[0, 8\]"):
        torch.ops.knnfast.transition_rows(
            torch.zeros(len(rows), 8), None, rows, x_t, x_t, weights, torch.arange(len(x_t)),
            torch.tensor([0]), 1.0, 1.0, 1.0, 0,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("head", "error"),
    [
        (lambda rows: rows[:1] @ torch.ones(24, 8), ValueError),
        (lambda rows: rows @ torch.ones(24, 9), ValueError),
        (lambda rows: (rows @ torch.ones(24, 8))[0], ValueError),
        (lambda rows: rows.double() @ torch.ones(24, 8).double(), TypeError),
        (lambda rows: (rows @ torch.ones(24, 8)).long(), TypeError),
        (lambda rows: None, TypeError),
    ],
)
def test_rejects_what_a_callable_head_should_not_return(head, error):
    features, null, _weight, _bias, x_t = make(8)
    weights = weights_of("mask_replace", 8, 50, 0)
    calls = iter([lambda rows: rows @ torch.ones(24, 8), head])
    for weight, more in (
        (head, {}),
        (lambda rows: next(calls)(rows), {"null_features": null, "guidance": 2.0}),
    ):
        with pytest.raises(error, match="weight"):
            ops.sample_head(features, weight, None, x_t, weights, seed=0, num_codes=8, **more)


def test_rejects_another_number_of_codes_than_the_weight_has():
    features, _null, weight, bias, x_t = make(8)
    with pytest.raises(ValueError, match="num_codes: weight has 8 rows, got 7"):
        ops.sample_head(
            features, weight, bias, x_t, weights_of("mask", 8, 50, 25), seed=0, num_codes=7
        )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Dynamo's and Inductor's
def test_compiles_with_inductor():
    features, null, weight, bias, x_t = make(16)
    weights, key = weights_of("mask_replace", 16, 50, 25), torch.tensor([3])

    def call(features, null, weight, bias, x_t, weights, seed):
        return 2 * ops.sample_head(
            features * 2.0, weight, bias, x_t, weights, seed=seed, null_features=null, guidance=2.0
        )

    args = features, null, weight, bias, x_t, weights, key
    assert torch.equal(torch.compile(call, fullgraph=True)(*args), call(*args))
