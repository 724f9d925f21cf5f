"""neighbour_attention: every backend within twice plain torch's error, against FP64.

Plain torch is projections + scaled_dot_product_attention at the same type, which is also what
`fold=False` computes.
"""

import pytest
import torch

from knnfast import ops, reference

SHAPES = [  # B, L, D, H, N
    (1, 1, 32, 1, 1), (2, 7, 48, 4, 3), (3, 33, 64, 8, 5), (2, 17, 130, 2, 11), (1, 1024, 64, 2, 2),
    (2, 9, 512, 8, 11), (1, 8, 1408, 16, 11), (2, 5, 1024, 16, 33), (2, 31, 101, 1, 32),
]  # fmt: skip


def make(B, L, D, H, N, dtype=torch.float32, mean=0.0):
    E = 20
    x = (torch.randn(B, L, D) + mean).to(dtype)

    def weight(*shape):
        return (torch.randn(*shape) / shape[-1] ** 0.5).to(dtype)

    n = torch.randn(B, N, E).to(dtype)
    layer = (weight(D, D), weight(D, E), weight(D, E), weight(D, D), *(weight(D) for _ in "qvo"))
    mask = torch.rand(B, N) < 0.7
    mask[0] = True
    if B > 1:
        mask[-1] = False
    scale, shift = (0.5 * torch.randn(B, D)).to(dtype), torch.randn(B, D).to(dtype)
    return x, n, layer, {"heads": H, "mask": mask}, {"scale": scale, "shift": shift}


def wide(values):
    return tuple(v.double() if v.is_floating_point() else v for v in values)


def rms(v):
    return float(v.square().mean().sqrt())


def within_twice(got, plain, exact, dtype):
    """Maximum and RMS error at most twice plain torch's, plus one rounding of the output."""
    floor = torch.finfo(dtype).eps * float(exact.abs().max())
    assert not torch.isnan(got).any()
    assert float((got - exact).abs().max()) <= 2 * float((plain - exact).abs().max()) + floor
    assert rms(got - exact) <= 2 * rms(plain - exact) + 0.1 * floor


def errors(run, shape, dtype, mean=0.0):
    x, n, layer, fold, ada = make(*shape, dtype=dtype, mean=mean)
    exact_ada = {k: v.double() for k, v in ada.items()}
    exact = reference.neighbour_attention(
        x.double(), reference.fold_neighbours(n.double(), *wide(layer), **fold), **exact_ada
    )
    plain = ops.neighbour_attention(x, ops.fold_neighbours(n, *layer, **fold, fold=False), **ada)
    got = run(x, ops.fold_neighbours(n, *layer, **fold, fold=True), ada)
    within_twice(got.double(), plain.double(), exact, dtype)
    assert torch.equal(got[~fold["mask"].any(-1)], x[~fold["mask"].any(-1)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_reference(shape, dtype):
    errors(lambda x, folded, ada: ops.neighbour_attention(x, folded, **ada), shape, dtype)


@pytest.mark.parametrize("mean", [10.0, 1000.0])
def test_large_mean(mean):
    errors(
        lambda x, folded, ada: ops.neighbour_attention(x, folded, **ada), (2, 9, 512, 8, 11),
        torch.float32, mean,
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy runs both sides of tl.where
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[1] < 40 and s[2] <= 512])
def test_triton_matches_reference(shape, dtype):
    if torch.cuda.is_available():
        pytest.skip("compiled in this process; the gpu tests cover it")
    from knnfast.kernels.neighbour_attention import launch_neighbour_attention

    errors(
        lambda x, f, ada: launch_neighbour_attention(
            x, *f, ada["scale"], ada["shift"], True, 1e-5, True
        ), shape, dtype,
    )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_cuda_matches_reference(shape, dtype):
    def run(x, folded, ada):
        folded = ops.Folded(*(v.cuda() for v in folded))
        ada = {k: v.cuda() for k, v in ada.items()}
        return ops.neighbour_attention(x.cuda(), folded, **ada).cpu()

    errors(run, shape, dtype)


def test_strided_views_shared_scale_and_no_norm():
    _, n, layer, fold, _ = make(2, 8, 64, 4, 5)
    folded = ops.fold_neighbours(n, *layer, **fold, fold=True)
    view = torch.randn(2, 16, 96)[:, ::2, 16:80]
    shared = torch.randn(64)
    for kw in (
        {"norm": False, "residual": False}, {"scale": shared, "shift": shared},
        {"shift": shared, "norm": False}, {"eps": 1e-2},
    ):  # fmt: skip
        got = ops.neighbour_attention(view, folded, **kw)
        expected = reference.neighbour_attention(view, folded, **kw)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    transposed = torch.randn(2, 64, 8).mT
    torch.testing.assert_close(
        ops.neighbour_attention(transposed, folded),
        reference.neighbour_attention(transposed, folded), rtol=1e-5, atol=1e-5,
    )  # fmt: skip


def test_fold_equals_reference_and_rule():
    _, n, layer, fold, _ = make(2, 1, 64, 4, 5, dtype=torch.float64)
    got = ops.fold_neighbours(n, *layer, **fold, fold=True)
    for mine, theirs in zip(got, reference.fold_neighbours(n, *layer, **fold), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert isinstance(ops.fold_neighbours(n, *layer, **fold), ops.Folded)  # 20 <= 48
    many = torch.randn(2, 13, 20).double()
    assert isinstance(ops.fold_neighbours(many, *layer, heads=4), ops.Unfolded)  # 52 > 48


def test_exact_on_integers():
    """One head, one embedding: the softmax is 1 and every number an integer."""
    x = torch.randint(-4, 5, (2, 5, 32)).float()
    C = torch.randint(-4, 5, (2, 1, 1, 32)).float()
    folded = ops.Folded(
        torch.randint(-3, 4, (2, 32, 1, 1)).float(), torch.zeros(2, 1, 1), C, torch.ones(32),
        torch.ones(2, 1, dtype=torch.bool),
    )  # fmt: skip
    got = ops.neighbour_attention(x, folded, norm=False)
    assert torch.equal(got, x + C[:, :, 0] + 1)


@pytest.mark.parametrize("norm", [True, False])
def test_gradients(norm):
    x, n, layer, fold, ada = make(2, 3, 8, 2, 3, dtype=torch.float64)
    folded = ops.fold_neighbours(n, *layer, **fold, fold=True)
    leaves = [x, *folded[:4], ada["scale"], ada["shift"]]
    leaves = [v.detach().clone().requires_grad_() for v in leaves]

    def call(x, A, a, C, bias, scale, shift):
        weights = ops.Folded(A, a, C, bias, fold["mask"])
        return ops.neighbour_attention(x, weights, scale=scale, shift=shift, norm=norm)

    torch.autograd.gradcheck(call, leaves)


def test_gradients_reach_the_weights():
    """Through fold_neighbours to every parameter, equal to the unfolded layer's."""
    x, n, layer, fold, ada = make(2, 6, 64, 4, 5)
    results = []
    for how in (True, False):
        leaves = [v.clone().requires_grad_() for v in (x, n, *layer)]
        folded = ops.fold_neighbours(leaves[1], *leaves[2:], **fold, fold=how)
        y = ops.neighbour_attention(leaves[0], folded, **ada)
        y.square().sum().backward()
        results.append([v.grad for v in leaves])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-3, atol=2e-3)


def test_rejects():
    x, n, layer, fold, ada = make(2, 3, 64, 4, 5)
    folded = ops.fold_neighbours(n, *layer, **fold, fold=True)
    with pytest.raises(ValueError, match="heads"):
        ops.fold_neighbours(n, *layer, heads=5)
    with pytest.raises(ValueError, match="mask"):
        ops.fold_neighbours(n, *layer, heads=4, mask=fold["mask"][:, 1:])
    with pytest.raises(TypeError, match="mask"):
        ops.fold_neighbours(n, *layer, heads=4, mask=fold["mask"].float())
    with pytest.raises(ValueError, match="at least one"):
        ops.fold_neighbours(n[:, :0], *layer, heads=4)
    with pytest.raises(ValueError, match=r"folded\.A"):
        ops.neighbour_attention(x[..., :32], folded)
    with pytest.raises(TypeError, match=r"folded\.A"):
        ops.neighbour_attention(x.half(), folded)
    with pytest.raises(ValueError, match="scale"):
        ops.neighbour_attention(x, folded, scale=ada["scale"][:1])


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's
def test_opcheck_compile_autocast():
    x, n, layer, fold, ada = make(2, 5, 64, 4, 5)
    folded = ops.fold_neighbours(n, *layer, **fold, fold=True)
    torch.library.opcheck(
        torch.ops.knnfast.neighbour_attention.default,
        (x, *folded, ada["scale"], None, True, 1e-5, True),
    )

    def call(x, A, a, C, bias, mask):
        return ops.neighbour_attention(x * 1.0, ops.Folded(A, a, C, bias, mask), **ada) * 2.0

    eager = call(x, *folded)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, *folded), eager)
    leaf, leaf2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    compiled(leaf, *folded).sum().backward()
    call(leaf2, *folded).sum().backward()
    torch.testing.assert_close(leaf.grad, leaf2.grad)

    class Layer(torch.nn.Module):
        def forward(self, *args):
            return call(*args)

    exported = torch.export.export(Layer(), (x, *folded))
    torch.testing.assert_close(exported.module()(x, *folded), eager)
    with torch.autocast("cpu", torch.bfloat16):
        low = ops.neighbour_attention(x, folded, **ada)
        out = ops.neighbour_attention(x, folded, **ada, residual=False)
    assert low.dtype == torch.float32  # the residual stream keeps its type
    assert out.dtype == torch.bfloat16
    assert torch.equal(low, x + out)
    full = ops.neighbour_attention(x, folded, **ada)
    torch.testing.assert_close(low, full, rtol=0.1, atol=0.1)
