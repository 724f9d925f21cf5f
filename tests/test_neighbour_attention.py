"""neighbour_attention: every backend within twice plain torch's error, against FP64.

Plain torch is projections + scaled_dot_product_attention at the same type, which is also what
`fold=False` computes.
"""

import itertools
from functools import partial

import pytest
import torch
from torch.utils._pytree import tree_map
from transition_helpers import within_twice

from knnfast import ops, reference

# Outputs hold NaN before a kernel writes them. torch's own CUDA ops warn when that mode finds them
# in another order than they promise.
pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.filterwarnings("ignore:.*does not have a deterministic implementation:UserWarning"),
]

SHAPES = [  # B, L, D, H, N
    (1, 1, 32, 1, 1), (2, 7, 48, 4, 3), (3, 33, 64, 8, 5), (2, 17, 130, 2, 11), (1, 1024, 64, 2, 2),
    (2, 9, 512, 8, 11), (1, 8, 1408, 16, 11), (2, 5, 1024, 16, 33), (2, 31, 101, 1, 32),
    (1, 63, 47, 1, 17), (2, 65, 49, 7, 7), (1, 1023, 33, 3, 16),
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


def errors(run, shape, dtype, mean=0.0, residual=True):
    """Without the residual the error budget is a share of the attention, not of x."""
    x, n, layer, fold, ada = make(*shape, dtype=dtype, mean=mean)
    ada["residual"] = residual
    exact_ada = {k: v.double() if torch.is_tensor(v) else v for k, v in ada.items()}
    exact = reference.neighbour_attention(
        x.double(), reference.fold_neighbours(n.double(), *wide(layer), **fold), **exact_ada
    )
    plain = ops.neighbour_attention(x, ops.fold_neighbours(n, *layer, **fold, fold=False), **ada)
    got = run(x, ops.fold_neighbours(n, *layer, **fold, fold=True), ada)
    within_twice(got, plain, exact, dtype)
    off = ~fold["mask"].any(-1)
    assert torch.equal(got[off], x[off] if residual else torch.zeros_like(x[off]))


def interpreted(x, folded, ada):
    """Call the Triton kernel on CPU tensors through the interpreter."""
    from knnfast.kernels.neighbour_attention import launch_neighbour_attention

    return launch_neighbour_attention(
        x, *folded, ada["scale"], ada["shift"], True, 1e-5, ada["residual"]
    )


def on_cuda(x, folded, ada):
    return attend_again(0, x, folded, ada)


def attend_again(times, x, folded, ada):
    x, folded, ada = tree_map(lambda v: v.cuda() if torch.is_tensor(v) else v, (x, folded, ada))
    got = ops.neighbour_attention(x, folded, **ada)
    for _ in range(times):
        assert torch.equal(ops.neighbour_attention(x, folded, **ada), got)
    return got.cpu()


@pytest.mark.isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_reference(shape, dtype):
    errors(lambda x, folded, ada: ops.neighbour_attention(x, folded, **ada), shape, dtype)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mean", [10.0, 1000.0])
def test_large_mean(mean, dtype):
    """Mean over deviation up to 1000."""
    errors(
        lambda x, folded, ada: ops.neighbour_attention(x, folded, **ada), (2, 9, 512, 8, 11),
        dtype, mean, residual=False,
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy runs both sides of tl.where
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(  # the last two: 128 tokens a program
    "shape",
    [*(s for s in SHAPES if s[1] < 40 and s[2] <= 512), (2, 130, 64, 8, 5), (1, 70, 130, 2, 11)],
)
def test_triton_matches_reference(shape, dtype):
    if torch.cuda.is_available():
        pytest.skip("compiled in this process; the gpu tests cover it")
    errors(interpreted, shape, dtype)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy runs both sides of tl.where
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("mean", [10.0, 1000.0])
def test_triton_large_mean(mean, dtype):
    if torch.cuda.is_available():
        pytest.skip("compiled in this process; the gpu tests cover it")
    for L in (9, 70):
        errors(interpreted, (2, L, 200, 8, 11), dtype, mean, residual=False)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy runs both sides of tl.where
def test_triton_slices_of_a_modulation():
    """Scale and shift as an AdaLN hands them on: rows of one tensor, or columns."""
    if torch.cuda.is_available():
        pytest.skip("compiled in this process; the gpu tests cover it")
    x, n, layer, fold, ada = make(3, 9, 64, 4, 5)
    folded = ops.fold_neighbours(n, *layer, **fold, fold=True)
    expected = interpreted(x, folded, ada | {"residual": True})
    for dim in (1, 2):
        scale, shift = torch.stack([ada["scale"], ada["shift"]], dim).unbind(dim)
        assert not scale.is_contiguous()
        got = interpreted(x, folded, {"scale": scale, "shift": shift, "residual": True})
        assert torch.equal(got, expected)


def unlike(kind):
    """What to add to the features for rows unlike their first features."""
    mean = torch.zeros(1024)
    if kind == "far":
        mean[:32] = 300.0
    else:  # FP16 overflows where the others are measured in deviations of the first
        mean[32:] = 3e4 * (-1.0) ** torch.arange(992)
    return mean


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy runs both sides of tl.where
@pytest.mark.parametrize("kind", ["far", "quiet"])
def test_triton_rows_unlike_their_first_features(kind):
    if torch.cuda.is_available():
        pytest.skip("compiled in this process; the gpu tests cover it")
    errors(interpreted, (2, 70, 1024, 8, 11), torch.float16, unlike(kind), residual=False)


def many(L):
    """So many images of L tokens that 128 of these stay together in a program."""
    return torch.cuda.get_device_properties(0).multi_processor_count // (2 * -(-L // 128)) + 1


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["far", "quiet"])
def test_cuda_rows_unlike_their_first_features(kind):
    for B in (2, many(70)):
        errors(on_cuda, (B, 70, 1024, 8, 11), torch.float16, unlike(kind), residual=False)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_cuda_matches_reference(shape, dtype):
    errors(on_cuda, shape, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("L", "D", "H", "N"),
    [(512, 64, 8, 5), (500, 96, 8, 11), (1024, 1024, 16, 11), (1024, 1024, 8, 11)],
)
def test_cuda_128_tokens_a_program(L, D, H, N, dtype):
    """The same bits each time: no copy may reach a tile that a product still reads."""
    errors(partial(attend_again, 50), (many(L), L, D, H, N), dtype)


def plain_attention(x, folded, scale=None, shift=None, norm=True, eps=1e-5, residual=True):
    """The folded form in plain torch, at the type of x."""
    A, a, C, bias, mask = folded

    def rows(v):
        return v[:, None] if v.dim() == 2 else v

    z = torch.nn.functional.layer_norm(x, x.shape[-1:], eps=eps) if norm else x
    z = z if scale is None else z * (1 + rows(scale))
    z = z if shift is None else z + rows(shift)
    score = torch.einsum("bld,bdnh->blnh", z, A) + a[:, None]
    on = mask.any(-1)[:, None, None]
    score = score.masked_fill((~mask[:, None] & on)[..., None], float("-inf"))
    out = torch.einsum("blnh,bnhd->bld", score.softmax(2), C) + bias
    out = torch.where(on, out, torch.zeros((), dtype=x.dtype))
    return x + out if residual else out


@pytest.mark.isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_strided_views_shared_scale_and_no_norm(dtype):
    _, n, layer, fold, _ = make(2, 8, 64, 4, 5, dtype=dtype)
    folded = ops.fold_neighbours(n, *layer, **fold, fold=True)
    exact_folded = ops.Folded(*wide(folded))
    shared = torch.randn(64).to(dtype)
    views = [
        torch.randn(2, 16, 96).to(dtype)[:, ::2, 16:80], torch.randn(2, 64, 8).to(dtype).mT,
        torch.randn(1, 8, 64).to(dtype).expand(2, -1, -1),
    ]  # fmt: skip
    for x, kw in itertools.product(views, (
        {}, {"norm": False, "residual": False}, {"scale": shared, "shift": shared},
        {"shift": shared, "norm": False}, {"eps": 1e-2},
    )):  # fmt: skip
        exact_kw = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in kw.items()}
        exact = reference.neighbour_attention(x.double(), exact_folded, **exact_kw)
        got = ops.neighbour_attention(x, folded, **kw)
        within_twice(got, plain_attention(x, folded, **kw), exact, dtype)


def test_fold_equals_reference_and_rule():
    _, n, layer, fold, _ = make(2, 1, 64, 4, 5, dtype=torch.float64)
    got = ops.fold_neighbours(n, *layer, **fold, fold=True)
    for mine, theirs in zip(got, reference.fold_neighbours(n, *layer, **fold), strict=True):
        torch.testing.assert_close(mine, theirs)
    for N, kind in ((14, ops.Folded), (15, ops.Unfolded)):  # 4 N on both sides of 0.9 * 64 = 57.6
        many = torch.randn(2, N, 20).double()
        assert isinstance(ops.fold_neighbours(many, *layer, heads=4), kind)


@pytest.mark.gpu
def test_cuda_folds_by_what_its_tiles_hold():
    """16 heads: 32 embeddings are 512 columns of D = 1024, 33 are 1,024."""
    for N, kind in ((32, ops.Folded), (33, ops.Unfolded)):
        _, n, layer, fold, _ = make(2, 1, 1024, 16, N, dtype=torch.float16)
        fold["mask"] = fold["mask"].cuda()
        assert isinstance(ops.fold_neighbours(n.cuda(), *(w.cuda() for w in layer), **fold), kind)


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


@pytest.mark.isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("where", [0, 1, 4])
def test_nan_scores(where, dtype):
    """NaN in an embedding's scores reaches its image's tokens, unless the embedding is off."""
    x, n, layer, options, ada = make(3, 9, 64, 4, 5, dtype)
    options["mask"] = torch.ones(3, 5, dtype=torch.bool)
    options["mask"][1, where] = False
    folded = ops.fold_neighbours(n, *layer, **options, fold=True)
    expected = ops.neighbour_attention(x, folded, **ada)
    folded.A[:2, 3, where, 1] = float("nan")
    got = ops.neighbour_attention(x, folded, **ada)
    assert got[0].isnan().all()
    assert torch.equal(got[1:], expected[1:])


@pytest.mark.isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_heads(dtype):
    """The empty sum is 0, not what the scratch held: y = x + b."""
    parts = torch.ones(2, 64, 3, 0), torch.ones(2, 3, 0), torch.ones(2, 3, 0, 64), torch.randn(64)
    folded = ops.Folded(*(v.to(dtype) for v in parts), torch.ones(2, 3, dtype=torch.bool))
    x = torch.randn(2, 9, 64, dtype=dtype)
    assert torch.equal(ops.neighbour_attention(x, folded), x + folded.bias)


@pytest.mark.isa
def test_subnormal_numbers_count():
    """Whatever the caller's mode, with which the threads of the pool do not compute."""
    x, n, layer, options, _ = make(2, 9, 64, 4, 5)
    options["mask"][0] = False
    folded = ops.fold_neighbours(n, *layer, **options, fold=True)
    x[0] = 1e-40
    torch.set_flush_denormal(True)
    try:
        got = ops.neighbour_attention(x, folded)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(got[0], x[0])


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_autocast_rounds_as_torch_does(norm, scale, device):
    """The normalised tokens and the weights, not digits of a mean that the norm takes off."""
    x, n, layer, options, ada = tree_map(
        lambda v: v.to(device) if torch.is_tensor(v) else v,
        make(2, 64, 64, 4, 5, mean=100.0 if norm else 0.0),
    )
    ada = {name: scale * v for name, v in ada.items()} | {"norm": norm}
    exact = reference.neighbour_attention(
        x.double(), reference.fold_neighbours(n.double(), *wide(layer), **options),
        **{name: v.double() for name, v in ada.items() if name != "norm"}, norm=norm,
    )  # fmt: skip
    with torch.autocast(device, torch.bfloat16):
        got, plain = (
            ops.neighbour_attention(x, ops.fold_neighbours(n, *layer, **options, fold=fold), **ada)
            for fold in (True, False)
        )
    within_twice(got - x, plain - x, exact - x.double(), torch.bfloat16)


def test_autocast_leaves_fp64():
    x, n, layer, options, ada = make(2, 9, 64, 4, 5, torch.float64)
    folded = ops.fold_neighbours(n, *layer, **options, fold=True)
    expected = ops.neighbour_attention(x, folded, **ada)
    with torch.autocast("cpu", torch.bfloat16):
        again = ops.fold_neighbours(n, *layer, **options, fold=True)
        assert torch.equal(ops.neighbour_attention(x, again, **ada), expected)
        with pytest.raises(TypeError, match=r"folded\.A: dtype must be one of float64"):
            ops.neighbour_attention(x, folded._replace(A=folded.A.float()), **ada)


def test_gradients_inside_an_autocast_region():
    """The backward pass is FP32's, wherever it is called."""
    x, n, layer, options, ada = make(2, 9, 64, 4, 5)
    folded = ops.fold_neighbours(n, *layer, **options, fold=True)
    leaves = [v.requires_grad_() for v in (x, *folded[:4], *ada.values())]
    y = ops.neighbour_attention(x, folded, **ada).square().sum()
    expected = torch.autograd.grad(y, leaves, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(y, leaves)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


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


@pytest.mark.parametrize("mean", [0.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 17, 130, 2, 11), (3, 33, 64, 8, 5), (1, 1, 32, 1, 1)])
def test_gradients_within_twice(shape, dtype, mean):
    """Each gradient against FP64 autograd of the definition, at most twice plain torch's error."""
    x, n, layer, fold, ada = make(*shape, dtype=dtype, mean=mean)
    folded = ops.fold_neighbours(n, *layer, **fold, fold=True)
    inputs = [x, *folded[:4], ada["scale"], ada["shift"]]
    dy = torch.randn(x.shape).to(dtype)

    def gradients(f, wider):
        leaves = [(v.double() if wider else v).detach().clone().requires_grad_() for v in inputs]
        x, A, a, C, bias, scale, shift = leaves
        y = f(x, ops.Folded(A, a, C, bias, fold["mask"]), scale=scale, shift=shift)
        y.backward(dy.to(y.dtype))
        return [v.grad for v in leaves]

    exact = gradients(reference.neighbour_attention, True)
    plain = gradients(plain_attention, False)
    for mine, theirs, truth in zip(
        gradients(ops.neighbour_attention, False), plain, exact, strict=True
    ):
        assert mine.dtype == dtype
        within_twice(mine, theirs, truth, dtype)


@pytest.mark.isa
def test_gradients_of_strided_weights():
    """A and C that lie in another order than the kernels read have the same gradients."""
    x, n, layer, fold, _ = make(2, 6, 64, 4, 5)
    folded = ops.fold_neighbours(n, *layer, **fold, fold=True)
    turned = folded._replace(
        A=folded.A.transpose(1, 3).contiguous().transpose(1, 3),
        C=folded.C.transpose(1, 2).contiguous().transpose(1, 2),
    )
    assert not turned.A.is_contiguous()
    assert not turned.C.is_contiguous()
    grads = []
    for weights in (folded, turned):
        leaves = [v.detach().requires_grad_() for v in (x, *weights[:4])]
        y = ops.neighbour_attention(leaves[0], ops.Folded(*leaves[1:], weights.mask))
        y.square().sum().backward()
        grads.append([v.grad for v in leaves])
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("shape", [(0, 3, 64, 4, 5), (2, 0, 64, 4, 5)])
def test_gradients_of_nothing(shape):
    B, L, D, H, N = shape
    leaves = [
        torch.zeros(s, requires_grad=True)
        for s in ((B, L, D), (B, D, N, H), (B, N, H), (B, N, H, D), (D,))
    ]
    mask = torch.ones(B, N, dtype=torch.bool)
    y = ops.neighbour_attention(leaves[0], ops.Folded(*leaves[1:], mask))
    y.sum().backward()
    assert y.shape == (B, L, D)
    assert all(not v.grad.any() for v in leaves)


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
    with pytest.raises(TypeError, match=r"heads: must be an integer, got 4\.0"):
        ops.fold_neighbours(n, *layer, heads=4.0)
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
    with pytest.raises(TypeError, match="scale: must be a tensor, got float"):
        ops.neighbour_attention(x, folded, scale=1.0)
    with pytest.raises(TypeError, match="folded: must come from fold_neighbours, got Tensor"):
        ops.neighbour_attention(x, x)
    with pytest.raises(TypeError, match="eps: must be a number, got None"):
        ops.neighbour_attention(x, folded, eps=None)
    names = ("w_q", "w_k", "w_v", "w_o", "b_q", "b_v", "b_o")
    for i, name in enumerate(names):
        for bad, error in ((layer[i][:-1], ValueError), (layer[i].double(), TypeError),
                           (layer[i].to("meta"), ValueError)):  # fmt: skip
            changed = (*layer[:i], bad, *layer[i + 1 :])
            with pytest.raises(error, match=name if error is TypeError or i > 0 else "w_"):
                ops.fold_neighbours(n, *changed, heads=4)
    with pytest.raises(ValueError, match="mask"):
        ops.fold_neighbours(n, *layer, heads=4, mask=fold["mask"].to("meta"))


@pytest.mark.parametrize("fold", [True, False])
def test_rejects_parts_of_other_shapes_types_and_devices(fold):
    """Every tensor of a public Folded or Unfolded, above all a mask that is no bool."""
    x, n, layer, options, _ = make(2, 3, 64, 4, 5)
    folded = ops.fold_neighbours(n, *layer, **options, fold=fold)
    for name, part in zip(folded._fields, folded, strict=True):
        for bad, error in (
            (part[..., :-1], ValueError), (part[None], ValueError), (part.to("meta"), ValueError),
            (part.to(torch.int64), TypeError), (part.to(torch.float16), TypeError),
        ):  # fmt: skip
            with pytest.raises(error, match=r"folded\.\w+: (shape|dtype|must be on)"):
                ops.neighbour_attention(x, folded._replace(**{name: bad}))
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match=r"folded\.mask"):
        ops.neighbour_attention(x, folded._replace(mask=folded.mask.float()))


def test_modulation_of_another_type():
    """Scale and shift come in any type; both forms take them in that of x."""
    x, n, layer, options, ada = make(2, 3, 64, 4, 5, torch.float16)
    for fold in (True, False):
        folded = ops.fold_neighbours(n, *layer, **options, fold=fold)
        wider = {name: v.float() for name, v in ada.items()}
        got = ops.neighbour_attention(x, folded, **wider)
        assert torch.equal(got, ops.neighbour_attention(x, folded, **ada))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's
def test_opcheck_compile_autocast(device):
    x, n, layer, fold, ada = tree_map(
        lambda v: v.to(device) if torch.is_tensor(v) else v, make(2, 5, 64, 4, 5)
    )
    folded = ops.fold_neighbours(n, *layer, **fold, fold=True)
    torch.library.opcheck(
        torch.ops.knnfast.neighbour_attention.default,
        (x, *folded, ada["scale"], None, True, 1e-5, True),
    )

    def call(x, A, a, C, bias, mask):
        return ops.neighbour_attention(x * 1.0, ops.Folded(A, a, C, bias, mask), **ada) * 2.0

    def fold_and_call(x, n, mask, *layer):
        return ops.neighbour_attention(
            x, ops.fold_neighbours(n, *layer, heads=4, mask=mask, fold=True), **ada
        )

    args = x, n, fold["mask"], *layer
    compiled = torch.compile(fold_and_call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args), fold_and_call(*args))

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
    with torch.autocast(device, torch.bfloat16):
        low = ops.neighbour_attention(x, folded, **ada)
        out = ops.neighbour_attention(x, folded, **ada, residual=False)
    assert low.dtype == torch.float32  # the residual stream keeps its type
    assert out.dtype == torch.bfloat16
    if device == "cpu":  # a kernel may add before it rounds
        assert torch.equal(low, x + out)
    full = ops.neighbour_attention(x, folded, **ada)
    torch.testing.assert_close(low, full, rtol=0.1, atol=0.1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Dynamo's and Inductor's
def test_compiles_with_inductor():
    x, n, layer, fold, ada = make(2, 5, 64, 4, 5)

    def call(x, n, mask, *layer):
        folded = ops.fold_neighbours(n, *layer, heads=4, mask=mask, fold=True)
        return ops.neighbour_attention(x * 2.0, folded, **ada) + 1.0

    results = []
    for run in (call, torch.compile(call, fullgraph=True)):
        leaves = [v.clone().requires_grad_() for v in (x, n, *layer)]
        y = run(*leaves[:2], fold["mask"], *leaves[2:])
        y.square().sum().backward()
        results.append([y.detach(), *(v.grad for v in leaves)])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
