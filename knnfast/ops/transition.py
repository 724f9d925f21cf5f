"""The transition step of discrete diffusion: tokens x_t and logits in, tokens x_s out.

Dense (`transition_step`) and row-sparse (`sample_head`) forms have one meaning, the mixture of
`knnfast.reference.transition_step`: most positions are decided without the network, so the dense
form reads few rows of the logits and the sparse form computes few rows of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from knnfast.ops import reference
from knnfast.ops._checks import (
    DTYPE_CODES,
    LOGIT_TYPES,
    check_device,
    check_dtype,
    check_number,
    check_seed,
    check_shape,
    check_whole,
    library,
    pointer,
    row_stride,
    rows,
)

_BAD = "logits: NaN, +inf or no finite class in {} of the rows that are drawn"
_SEED_MASK = (1 << 64) - 1
_LARGEST = 2.0**100  # of a sharpness, purity's or 1 / temperature: at inf the best class is NaN


def transition_step(
    logits: Tensor,
    x_t: Tensor,
    weights: Tensor,
    *,
    seed: int | Tensor,
    image_indices: Tensor | None = None,
    null_logits: Tensor | None = None,
    guidance: float = 1.0,
    temperature: float = 1.0,
    top_r: float = 1.0,
    top_k: int = 0,
    purity: float | None = None,
) -> Tensor:
    """Draw x_s ~ p(x_s | x_t) from the logits of p(x_0 | x_t).

    p(x_s | x_t) = w_p p + w_u uniform + (1 - w_p - w_u) [x_s = x_t]

    (Gu et al. 2022; for any stride, and as a mixture: derived, docs/ops.md.)

    Args:
        logits: [B, L, K], fp16 | bf16 | fp32, last stride 1 (anything else is copied); on CUDA
            K <= 65,536.
        x_t: tokens in [0, K], [B, L] int64; K is MASK.
        weights: the step, [7] or [B, 7] fp64, from `transition_weights`, on the device of logits.
        seed: the Philox key, in [-2^63, 2^63); an int64 tensor of one element can change between
            graph replays.
        image_indices: [B] int64 in [0, 2^32), each image's place in the random counters; 0..B-1
            when None.
        null_logits: the unconditional pass, like logits: l = null + guidance (logits - null).
        guidance: 1 means none, and is all there can be without null_logits.
        temperature: > 0, divides the logits; what is outside [2^-100, 2^100] counts as its end.
        top_r: keep the classes that hold this mass; 1 keeps all.
        top_k: keep this many classes; 0 keeps all.
        purity: sharpness r >= 0 of purity sampling (Tang et al. 2022), which sets the purest masked
            positions; above 2^100 it counts as that.

    Returns:
        x_s: [B, L] int64.
    Raises: ValueError shape, range, device; on the CPU also a token outside [0, K], an image index
        out of range, weights that are not finite, and NaN, +inf or no finite class in a row that is
        drawn; TypeError dtype. On CUDA nothing synchronises: a token of such a row is -1, one
        outside [0, K] counts as a code of probability 0.
    Numerics: choices in FP64; p in FP32, for the same seed perturbed scores agree with FP64 within
        1e-5, or 1e-6 |guidance (logits - null_logits)| / temperature (their maxima taken off) where
        that is more.
    Backends: Triton on CUDA, C++ on the CPU; defined by `reference.transition_step`.
    Memory: O(B L).  Deterministic: yes.  Differentiable: no.
    """
    check_dtype("logits", logits, LOGIT_TYPES)
    check_shape("logits", logits, (None, None, None))
    B, L, K = logits.shape
    if null_logits is not None:
        check_dtype("null_logits", null_logits, (logits.dtype,))
        check_shape("null_logits", null_logits, (B, L, K))
        check_device("null_logits", null_logits, logits.device)
    x_t, weights, image_indices, seed = _check_step(
        logits, B, L, K, x_t, weights, image_indices, seed, guidance, temperature, top_r, top_k
    )
    _check_null("null_logits", null_logits, guidance)
    if purity is not None:
        check_number("purity", purity)
        if purity < 0:
            raise ValueError(f"purity: must be >= 0, got {purity}")
        purity = min(float(purity), _LARGEST)
    return torch.ops.knnfast.transition_step(
        logits, null_logits, x_t, weights, image_indices, seed,
        *_rule(K, guidance, temperature, top_r, top_k), purity,
    )  # fmt: skip


def sample_head(
    features: Tensor,
    weight: Tensor | Callable[[Tensor], Tensor],
    bias: Tensor | None,
    x_t: Tensor,
    weights: Tensor,
    *,
    seed: int | Tensor,
    image_indices: Tensor | None = None,
    null_features: Tensor | None = None,
    guidance: float = 1.0,
    temperature: float = 1.0,
    top_r: float = 1.0,
    top_k: int = 0,
    num_codes: int | None = None,
) -> Tensor:
    """Draw x_s ~ p(x_s | x_t) with the head run on the rows that need it alone.

    logits = features @ weight.T + bias; the tokens are `transition_step`'s for those logits.

    Args:
        features: [B, L, D], what the head reads, fp16 | bf16 | fp32.
        weight: [K, D] of the head's linear layer; or any callable from rows [n, D] to logits
            [n, K] (then bias is None and num_codes says K; a callable may not look at other rows).
        bias: [K] or None.
        x_t, weights, seed, image_indices, guidance, temperature, top_r, top_k: as in
            `transition_step`.
        null_features: features of the unconditional pass, like features.

    Returns:
        x_s: [B, L] int64.
    Raises: as `transition_step`; on CUDA K is at most 65,536 in both.
    Memory: for each pass FP32 logits [n, K] of the n rows that are drawn (3 % at 100 steps); with a
        weight on CUDA, where the host does not know n, of all [B L, K].
    Backends: Triton on CUDA, C++ on the CPU; defined by `reference.sample_head`.
    Numerics: FP32 logits from sums in one order, so that a token depends on its own row alone.
    A callable head on CUDA synchronises once, to learn n; a weight does not.
    """
    check_dtype("features", features, LOGIT_TYPES)
    check_shape("features", features, (None, None, None))
    B, L, D = features.shape
    if null_features is not None:
        check_dtype("null_features", null_features, (features.dtype,))
        check_shape("null_features", null_features, (B, L, D))
        check_device("null_features", null_features, features.device)
    if num_codes is not None:
        check_whole("num_codes", num_codes)
    if isinstance(weight, Tensor):
        check_dtype("weight", weight, (features.dtype,))
        check_shape("weight", weight, (None, D))
        check_device("weight", weight, features.device)
        if num_codes not in (None, weight.shape[0]):
            raise ValueError(f"num_codes: weight has {weight.shape[0]} rows, got {num_codes}")
        num_codes = weight.shape[0]
        if bias is not None:
            check_dtype("bias", bias, (features.dtype,))
            check_shape("bias", bias, (num_codes,))
            check_device("bias", bias, features.device)
    elif bias is not None or num_codes is None:
        raise ValueError("weight: a callable head takes bias=None and needs num_codes")
    x_t, weights, image_indices, seed = _check_step(
        features, B, L, num_codes, x_t, weights, image_indices, seed, guidance, temperature, top_r,
        top_k,
    )  # fmt: skip
    _check_null("null_features", null_features, guidance)
    options = _rule(num_codes, guidance, temperature, top_r, top_k)
    if isinstance(weight, Tensor):
        return torch.ops.knnfast.sample_head(
            features, null_features, weight, bias, x_t, weights, image_indices, seed, *options
        )
    if x_t.numel() == 0:
        return x_t.clone()
    x_s, drawn = torch.ops.knnfast.transition_choose(x_t, weights, image_indices, seed, num_codes)
    if drawn.numel() == 0:
        return x_s
    logits = _called(weight, features, drawn, num_codes, LOGIT_TYPES)
    null = None
    if null_features is not None:
        null = _called(weight, null_features, drawn, num_codes, (logits.dtype,))
    return torch.ops.knnfast.transition_rows(
        logits, null, drawn, x_t, x_s, weights, image_indices, seed, *options
    )


def _called(
    head: Callable[[Tensor], Tensor],
    features: Tensor,
    drawn: Tensor,
    num_codes: int,
    types: Sequence[torch.dtype],
) -> Tensor:
    """A callable head's logits of the drawn rows, checked."""
    logits = head(features.reshape(-1, features.shape[-1])[drawn])
    if not isinstance(logits, Tensor):
        raise TypeError(f"weight: the callable must return a tensor, got {type(logits).__name__}")
    check_dtype("weight's logits", logits, types)
    check_shape("weight's logits", logits, (len(drawn), num_codes))
    check_device("weight's logits", logits, features.device)
    return logits


sample_prior = reference.sample_prior


def _check_step(
    like: Tensor,
    B: int,
    L: int,
    K: int,
    x_t: Tensor,
    weights: Tensor,
    image_indices: Tensor | None,
    seed: int | Tensor,
    guidance: float,
    temperature: float,
    top_r: float,
    top_k: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_dtype("x_t", x_t, (torch.int64,))
    check_shape("x_t", x_t, (B, L))
    check_device("x_t", x_t, like.device)
    check_dtype("weights", weights, (torch.float64,))
    check_shape("weights", weights, (B, 7) if weights.dim() == 2 else (7,))
    check_device("weights", weights, like.device)
    if K < 2:
        raise ValueError(f"logits: at least 2 classes, got {K}")
    check_number("guidance", guidance)
    check_number("temperature", temperature)
    check_number("top_r", top_r)
    if temperature <= 0:
        raise ValueError(f"temperature: must be > 0, got {temperature}")
    if not 0 < top_r <= 1:
        raise ValueError(f"top_r: must be in (0, 1], got {top_r}")
    check_whole("top_k", top_k)
    if top_k < 0:
        raise ValueError(f"top_k: must be >= 0, got {top_k}")
    if image_indices is None:
        image_indices = torch.arange(B, device=like.device)
    else:
        check_dtype("image_indices", image_indices, (torch.int64,))
        check_shape("image_indices", image_indices, (B,))
        check_device("image_indices", image_indices, like.device)
    check_seed(seed, like.device)
    if not isinstance(seed, Tensor):
        seed = torch.full((1,), seed, dtype=torch.int64, device=like.device)
    return x_t, weights, image_indices, seed.reshape(1)


def _check_null(name: str, null: Tensor | None, guidance: float) -> None:
    if null is None and guidance != 1:
        raise ValueError(f"guidance: must be 1 without {name}, got {guidance}")


def _rule(
    K: int, guidance: float, temperature: float, top_r: float, top_k: int
) -> tuple[float, float, float, int]:
    """What the kernels take: numbers that their types hold."""
    temperature = min(max(float(temperature), 1 / _LARGEST), _LARGEST)
    return float(guidance), temperature, float(top_r), min(int(top_k), K)


# ---------------------------------------------------------------------------------------------
# Registration

_STEP = "Tensor x_t, Tensor weights, Tensor image_indices, Tensor seed"
_RULE = "float guidance, float temperature, float top_r, int top_k"
library.define(
    f"transition_step(Tensor logits, Tensor? null_logits, {_STEP}, {_RULE}, float? purity)"
    " -> Tensor"
)
library.define(
    "sample_head(Tensor features, Tensor? null_features, Tensor weight, Tensor? bias, "
    f"{_STEP}, {_RULE}) -> Tensor"
)
library.define(f"transition_choose({_STEP}, int num_codes) -> (Tensor, Tensor)")
library.define(
    "transition_rows(Tensor logits, Tensor? null_logits, Tensor rows, Tensor x_t, Tensor x_s, "
    f"Tensor weights, Tensor image_indices, Tensor seed, {_RULE}) -> Tensor"
)


def _grid(x_t: Tensor, K: int, weights: Tensor, image_indices: Tensor, seed: Tensor) -> tuple:
    B, L = x_t.shape
    key = int(seed) & _SEED_MASK
    step = 7 if weights.dim() == 2 else 0
    return B, L, K, pointer(weights), step, pointer(image_indices), key


def _checked(count: int, num_codes: int) -> int:
    """A count from C++, which is negative where it refused an argument (csrc/ops/ops_cpu.h)."""
    if count == -1:
        raise ValueError(f"x_t: tokens must be in [0, {num_codes}], {num_codes} is MASK")
    if count == -2:
        raise ValueError("image_indices: must be in [0, 2^32)")
    if count == -3:
        raise ValueError("weights: must be finite")
    return count


def _raise_bad(bad: int, num_codes: int) -> None:
    if _checked(bad, num_codes):
        raise ValueError(_BAD.format(bad))


def _step_cpu(
    logits, null_logits, x_t, weights, image_indices, seed,
    guidance, temperature, top_r, top_k, purity,
):  # fmt: skip
    from knnfast import _C

    logits, x_t, weights = rows(logits), x_t.contiguous(), weights.contiguous()
    image_indices = image_indices.contiguous()
    null = None if null_logits is None else rows(null_logits)
    K = logits.shape[-1]
    grid = _grid(x_t, K, weights, image_indices, seed)
    x_s = torch.empty_like(x_t)
    rule = DTYPE_CODES[logits.dtype], guidance, temperature, top_r, top_k
    stride, null_stride = row_stride(logits), 0 if null is None else row_stride(null)
    if purity is not None:
        _raise_bad(
            _C.transition_purity(
                *grid, *rule, purity, pointer(logits), pointer(null), stride, null_stride,
                pointer(x_t), pointer(x_s),
            ),
            K,
        )  # fmt: skip
        return x_s
    drawn = torch.empty(x_t.numel(), dtype=torch.int64)
    count = _checked(_C.transition_choose(*grid, pointer(x_t), pointer(x_s), pointer(drawn)), K)
    _raise_bad(
        _C.transition_rows(
            *grid, *rule, pointer(logits), pointer(null), stride, null_stride, False,
            pointer(x_t), pointer(drawn), count, pointer(x_s),
        ),
        K,
    )  # fmt: skip
    return x_s


def _choose_cpu(x_t, weights, image_indices, seed, num_codes):
    from knnfast import _C

    x_t, weights, image_indices = x_t.contiguous(), weights.contiguous(), image_indices.contiguous()
    x_s, drawn = torch.empty_like(x_t), torch.empty(x_t.numel(), dtype=torch.int64)
    grid = _grid(x_t, num_codes, weights, image_indices, seed)
    count = _C.transition_choose(*grid, pointer(x_t), pointer(x_s), pointer(drawn))
    return x_s, drawn[: _checked(count, num_codes)].clone()


def _rows_cpu(
    logits, null_logits, drawn, x_t, x_s, weights, image_indices, seed,
    guidance, temperature, top_r, top_k,
):  # fmt: skip
    from knnfast import _C

    logits, x_t, weights = rows(logits), x_t.contiguous(), weights.contiguous()
    image_indices, drawn = image_indices.contiguous(), drawn.contiguous()
    null = None if null_logits is None else rows(null_logits)
    x_s, K = x_s.clone(memory_format=torch.contiguous_format), logits.shape[-1]
    _raise_bad(
        _C.transition_rows(
            *_grid(x_t, K, weights, image_indices, seed),
            DTYPE_CODES[logits.dtype], guidance, temperature, top_r, top_k,
            pointer(logits), pointer(null), row_stride(logits),
            0 if null is None else row_stride(null), True,
            pointer(x_t), pointer(drawn), drawn.numel(), pointer(x_s),
        ),
        K,
    )  # fmt: skip
    return x_s


def _head_cpu(
    features, null_features, weight, bias, x_t, weights, image_indices, seed,
    guidance, temperature, top_r, top_k,
):  # fmt: skip
    from knnfast import _C

    K, D = weight.shape
    x_s, drawn = _choose_cpu(x_t, weights, image_indices, seed, K)
    if drawn.numel() == 0:
        return x_s
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()

    def head(f):
        f = f.contiguous()
        logits = torch.empty(len(drawn), K, dtype=torch.float32)
        _C.head_rows(
            DTYPE_CODES[f.dtype], D, K, pointer(f), pointer(drawn), len(drawn), pointer(weight),
            pointer(bias), pointer(logits),
        )  # fmt: skip
        return logits

    return _rows_cpu(
        head(features), None if null_features is None else head(null_features), drawn, x_t, x_s,
        weights, image_indices, seed, guidance, temperature, top_r, top_k,
    )  # fmt: skip


def _step_cuda(*args):
    from knnfast.kernels.transition_step import launch_transition_step

    with torch.cuda.device_of(args[0]):
        return launch_transition_step(*args)


def _head_cuda(*args):
    from knnfast.kernels.sample_head import launch_sample_head

    with torch.cuda.device_of(args[0]):
        return launch_sample_head(*args)


def _choose_cuda(x_t, weights, image_indices, seed, num_codes):
    from knnfast.kernels.transition_step import launch_transition_choose

    with torch.cuda.device_of(x_t):
        x_s, drawn, count = launch_transition_choose(x_t, weights, image_indices, seed, num_codes)
    return x_s, drawn[: int(count)].sort()[0]


def _rows_cuda(*args):
    from knnfast.kernels.transition_step import launch_transition_rows

    with torch.cuda.device_of(args[0]):
        return launch_transition_rows(*args)


for _name, _cpu, _cuda in (
    ("transition_step", _step_cpu, _step_cuda),
    ("sample_head", _head_cpu, _head_cuda),
    ("transition_choose", _choose_cpu, _choose_cuda),
    ("transition_rows", _rows_cpu, _rows_cuda),
):
    library.impl(_name, _cpu, "CPU")
    library.impl(_name, _cuda, "CUDA")


@torch.library.register_fake("knnfast::transition_step", lib=library)
def _(logits, null_logits, x_t, *_):
    return x_t.new_empty(x_t.shape)


@torch.library.register_fake("knnfast::sample_head", lib=library)
def _(features, null_features, weight, bias, x_t, *_):
    return x_t.new_empty(x_t.shape)


@torch.library.register_fake("knnfast::transition_choose", lib=library)
def _(x_t, *_):
    count = torch.library.get_ctx().new_dynamic_size()
    return x_t.new_empty(x_t.shape), x_t.new_empty((count,))


@torch.library.register_fake("knnfast::transition_rows", lib=library)
def _(logits, null_logits, drawn, x_t, *_):
    return x_t.new_empty(x_t.shape)
