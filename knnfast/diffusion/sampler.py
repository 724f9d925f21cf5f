"""Sampling: from the prior down any list of levels, each step exact."""

from __future__ import annotations

import functools
import math
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor

from knnfast._phases import phase
from knnfast.diffusion.packed import PackedDenoiser
from knnfast.diffusion.schedule import Schedule
from knnfast.ops import sample_head, sample_prior, transition_step, transition_weights
from knnfast.ops._checks import LOGIT_TYPES, check_device, check_dtype, check_shape

if TYPE_CHECKING:
    from knnfast.diffusion.denoiser import Condition, Denoiser


class Sampler:
    """The sampling loop of one network for one list of levels and one rule.

    A call runs it op by op; `SamplingGraph` records a call once and replays it. Nothing in the loop
    reads a result on the host, so on CUDA it never synchronises.

    Args:
        denoiser: the network.
        schedule: of the corruption; may be another one than in training.
        steps: number of steps, or the levels to visit (falling from T); any list is exact.
        guidance: w in l = l_null + w (l_cond - l_null); 1 means none.
        truncation: keep the most probable classes up to this mass; 1 keeps all.
        top_k: keep this many classes; 0 keeps all.
        temperature: divides the logits after guidance.
        top: the level to begin at; None: T.
        purity: sharpness r >= 0 of purity sampling (Improved VQ-Diffusion): each step draws the
            masked codes that the network is surest of, from p^(1 + r max p); None: any of them,
            from p, which is the exact process.

    Raises:
        ValueError: as `check_rule`, or another number of codes. TypeError: weights of a type that
            the ops do not take.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        schedule: Schedule,
        steps: int | Sequence[int] = 25,
        guidance: float = 3.0,
        truncation: float = 1.0,
        top_k: int = 0,
        temperature: float = 1.0,
        top: int | None = None,
        purity: float | None = None,
    ) -> None:
        if schedule.num_codes != denoiser.config.num_codes:
            raise ValueError(
                f"the schedule's num_codes {schedule.num_codes} is not the denoiser's "
                f"{denoiser.config.num_codes}"
            )
        check_dtype("denoiser", denoiser.head.weight, LOGIT_TYPES)
        self.denoiser, self.schedule, self.guided = denoiser, schedule, guidance != 1.0
        self.levels = check_rule(
            schedule, steps, guidance, truncation, top_k, temperature, top, purity
        )
        self.purity = purity
        self.rule: dict[str, Any] = {
            "guidance": guidance,
            "temperature": temperature,
            "top_r": truncation,
            "top_k": top_k,
        }
        k = schedule.num_codes
        rows = [transition_weights(schedule, t, s, k) for t, s in pairwise(self.levels)]
        self.weights = torch.stack(rows).to(denoiser.head.weight.device)

    @torch.no_grad()
    def __call__(
        self,
        cond: Tensor,
        cond_mask: Tensor,
        seed: int | Tensor = 0,
        image_indices: Tensor | None = None,
        callback: Callable[[int, int], None] | None = None,
        source: Tensor | None = None,
        start: Tensor | None = None,
    ) -> Tensor:
        """Draw codes.

        Args:
            cond: condition embeddings, [B, k+1, E], query first, then neighbours nearest first.
            cond_mask: which of them are on, [B, k+1] bool.
            seed: of the random numbers, in [0, 2^64), or a tensor [1] int64 of its bits; with the
                image index it fixes an image, whatever the batch (on the CPU to the last bit; on a
                GPU up to the rounding of its matrix products).
            image_indices: [B] int64, the images' indices in the random numbers; default 0...B-1.
            callback: called with (steps done, steps) after each step.
            source: codes of the pictures that an editor edits, [B, L] int64, K where unknown; an
                editor without them knows nothing and draws from the condition alone.
            start: codes to begin with, [B, L] int64, K where they are to be drawn, as many as the
                first level has; by default they are drawn from the prior.

        Returns:
            Codes, [B, L] int64.

        Raises:
            ValueError: the shape or device of a tensor, a code outside [0, K] (on the host), or a
                seed outside [0, 2^64).
            TypeError: a tensor's type.
        """
        if not isinstance(seed, Tensor):
            seed = signed(seed)
        self.check_inputs(cond, cond_mask, image_indices)
        k = self.schedule.num_codes
        shape = len(cond), self.denoiser.config.length
        for name, codes in (("start", start), ("source", source)):
            if codes is None:
                continue
            check_dtype(name, codes, (torch.int64,))
            check_shape(name, codes, shape)
            on_host = codes.device.type == "cpu"  # elsewhere looking would synchronise
            if on_host and codes.numel() and not 0 <= codes.min() <= codes.max() <= k:
                raise ValueError(f"{name}: codes must be in [0, {k}], the mask is {k}")
        if not len(cond):
            return torch.zeros(shape, dtype=torch.int64, device=cond.device)
        x = start
        if x is None:
            x = sample_prior(
                self.schedule, self.levels[0], k, shape, seed=seed, image_indices=image_indices,
                device=cond.device,
            )  # fmt: skip
        if source is None and self.denoiser.config.source:
            source = torch.full(shape, k, device=cond.device)
        network = self._network(cond, cond_mask, source)
        for done, (t, weights) in enumerate(zip(self.levels, self.weights, strict=False), start=1):
            with phase("sample.features"):
                rows = network(x, t)
            with phase("sample.head"):
                x = self._draw(rows, x, weights, seed, image_indices)
            if callback is not None:
                callback(done, len(self.weights))
        return x

    def _draw(
        self, rows: Tensor, x: Tensor, weights: Tensor, seed: int | Tensor, images: Tensor | None
    ) -> Tensor:
        """The next codes, from what the head reads, [1 or 2, B, L, W]."""
        head, of = self.denoiser.head, {"seed": seed, "image_indices": images, **self.rule}
        if self.purity is None:
            null = rows[1] if self.guided else None
            return sample_head(
                rows[0], head.weight, head.bias, x, weights, null_features=null, **of
            )
        # It ranks all masked codes, so it needs all logits; each image's by itself, as below.
        size = 1 if x.device.type == "cpu" else len(x)
        parts = [F.linear(part, head.weight, head.bias) for part in rows.split(size, 1)]
        logits = torch.cat(parts, 1)
        null = logits[1] if self.guided else None
        return transition_step(logits[0], x, weights, null_logits=null, purity=self.purity, **of)

    def check_inputs(
        self, cond: Tensor, cond_mask: Tensor, image_indices: Tensor | None = None
    ) -> None:
        """Refuse a condition, its mask or the images' indices as a call does."""
        config, weight = self.denoiser.config, self.denoiser.head.weight
        check_dtype("cond", cond, (weight.dtype,))
        check_shape("cond", cond, (None, None, config.embed_dim))
        check_dtype("cond_mask", cond_mask, (torch.bool,))
        check_shape("cond_mask", cond_mask, cond.shape[:2])
        given = {"cond": cond, "cond_mask": cond_mask}
        if image_indices is not None:
            check_dtype("image_indices", image_indices, (torch.int64,))
            check_shape("image_indices", image_indices, cond.shape[:1])
            given["image_indices"] = image_indices
        for name, each in given.items():
            check_device(name, each, weight.device)

    def _network(
        self, cond: Tensor, mask: Tensor, source: Tensor | None
    ) -> Callable[[Tensor, int], Tensor]:
        """(codes [B, L], t) -> what the head reads, [1 or 2, B, L, W], the null's last.

        On the CPU every image has the network to itself: a matrix product rounds by its shape, and
        an image must not depend on its batch. A GPU needs the whole batch to be busy.
        """
        size = 1 if cond.device.type == "cpu" else len(cond)
        parts = [slice(i, i + size) for i in range(0, len(cond), size)]
        sources = [None if source is None else source[p] for p in parts]
        each = list(zip((cond[p].clone() for p in parts), (mask[p] for p in parts), sources,
                        strict=True))  # fmt: skip
        if PackedDenoiser.serves(self.denoiser, cond):
            packed = PackedDenoiser(self.denoiser, self.levels)
            images = [packed.prepare(*one) for one in each]
            return lambda x, t: packed.features(x, t, images, self.guided)
        conditions = [self._prepare(*one) for one in each]
        return lambda x, t: torch.cat(
            [self._features(x[p], t, c) for p, c in zip(parts, conditions, strict=True)], 1
        )

    def _prepare(self, cond: Tensor, mask: Tensor, source: Tensor | None) -> Condition:
        if self.guided:
            cond = torch.cat([cond, torch.zeros_like(cond)])
            mask = torch.cat([mask, torch.zeros_like(mask)])
            source = None if source is None else torch.cat([source, source])
        # The fused attention wants one type throughout, which autocast does not keep.
        fold = not torch.is_autocast_enabled(cond.device.type)
        return self.denoiser.prepare(cond, mask, fold=fold, source=source)

    def _features(self, x: Tensor, t: int, condition: Condition) -> Tensor:
        """What the head reads, [1 or 2, B, L, W]: with the condition, and without when guided."""
        x = x.clamp_min(0)  # -1, a bad row's token on CUDA, is no row of the embedding
        codes = torch.cat([x, x]) if self.guided else x
        level = torch.full((len(codes),), t, dtype=torch.int64, device=x.device)
        rows = self.denoiser.features(codes, level, condition)
        return rows.to(self.denoiser.head.weight.dtype).unflatten(0, (-1, len(x)))


# Recordings and replays take turns. To begin a recording waits for the whole device, which would
# break another that is under way.
_turn = threading.RLock()
# Graphs whose recording broke off: torch's allocator may go on asking them what is theirs.
_broken: list[torch.cuda.CUDAGraph] = []


@functools.cache
def _shared(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Event]:
    """The stream that records a device's graphs, and when the last result was taken from one.

    cuBLAS has one workspace for all that is recorded on a stream, and torch's new streams are old
    ones after 32. So there is one stream, and a replay waits for the one before it.
    """
    return torch.cuda.Stream(device), torch.cuda.Event()


class SamplingGraph:
    """A sampler's whole run for a fixed batch as one CUDA graph: one launch, no synchronisation.

    Any number of threads may record and replay, on any streams; on a device, replays run one after
    another.

    Args:
        sampler: on a CUDA device.
        batch: B.
        tokens: k + 1 condition embeddings an image.

    Raises:
        ValueError: the sampler is not on a CUDA device.
    """

    def __init__(self, sampler: Sampler, batch: int, tokens: int) -> None:
        weight = sampler.denoiser.head.weight
        device = weight.device
        if device.type != "cuda":
            raise ValueError(f"sampler: must be on a CUDA device, got {device}")
        self.sampler = sampler  # its weights must stay where they are
        # Inputs that a later call may overwrite, whatever mode this one is in.
        with torch.inference_mode(False), torch.cuda.device(device):
            self._record(batch, tokens, weight)

    def _record(self, batch: int, tokens: int, weight: Tensor) -> None:
        sampler, device = self.sampler, weight.device
        width, here = sampler.denoiser.config.embed_dim, torch.cuda.current_stream()
        self.cond = torch.zeros(batch, tokens, width, dtype=weight.dtype, device=device)
        self.mask = torch.ones(batch, tokens, dtype=torch.bool, device=device)
        self.seed = torch.zeros(1, dtype=torch.int64, device=device)
        self.indices = torch.arange(batch, device=device)
        inputs = self.cond, self.mask, self.seed, self.indices
        self.graph = torch.cuda.CUDAGraph()
        # Around the capture, too: torch stays on its stream where that breaks off.
        with _turn, torch.cuda.stream(_shared(device)[0]):
            side, self.drawn = _shared(device)
            side.wait_stream(here)
            side.wait_event(self.drawn)
            for _ in range(2):  # kernels are compiled and workspaces made
                sampler(*inputs)
            try:
                # Other threads may allocate meanwhile.
                with torch.cuda.graph(self.graph, stream=side, capture_error_mode="thread_local"):
                    self.codes = sampler(*inputs)
            except BaseException:
                self.graph.reset()
                _broken.append(self.graph)
                raise
            here.wait_stream(side)

    def __call__(
        self, cond: Tensor, cond_mask: Tensor, seed: int = 0, image_indices: Tensor | None = None
    ) -> Tensor:
        """Draw codes as `Sampler` does; the result is overwritten by the next call.

        Raises:
            ValueError, TypeError: as `Sampler`; another batch or number of embeddings.
        """
        self.sampler.check_inputs(cond, cond_mask, image_indices)
        check_shape("cond", cond, self.cond.shape)
        bits, stream = signed(seed), torch.cuda.current_stream(self.cond.device)
        with _turn:
            stream.wait_event(self.drawn)
            self.cond.copy_(cond)
            self.mask.copy_(cond_mask)
            self.seed.fill_(bits)
            if image_indices is None:
                torch.arange(len(self.indices), out=self.indices)
            else:
                self.indices.copy_(image_indices)
            self.graph.replay()
            self.drawn.record(stream)
        return self.codes

    def draw(
        self, cond: Tensor, cond_mask: Tensor, seed: int = 0, image_indices: Tensor | None = None
    ) -> Tensor:
        """The same as a tensor of the caller's own, which no other thread's call overwrites."""
        with _turn:
            codes = self(cond, cond_mask, seed, image_indices).clone()
            self.drawn.record(torch.cuda.current_stream(codes.device))
        return codes


class SamplingGraphs:
    """Draws as `Denoiser.sample` does, from a CUDA graph where the same kind comes again.

    A kind is a batch, a number of condition embeddings, the levels, the rule, and the place of the
    weights in memory. Its first call runs op by op, the second is recorded (`SamplingGraph`); from
    then on calls are replays, and give the tokens that the loop gives. The `size` kinds that were
    used last are kept; each holds the memory of its run, copies of the inputs, and the network.

    Any number of threads may call, on any streams; replays take turns.
    """

    def __init__(self, size: int = 4) -> None:
        self.size = size
        # None: seen once. False: could not be recorded.
        self._kept: OrderedDict[tuple[Any, ...], SamplingGraph | Literal[False] | None]
        self._kept = OrderedDict()

    @staticmethod
    def serves(denoiser: Any) -> TypeGuard[Denoiser]:
        """Whether it is a plain `Denoiser` on CUDA: no hooks, no method replaced, no autocast."""
        from knnfast.diffusion.denoiser import Denoiser

        if type(denoiser) is not Denoiser or denoiser.head.weight.device.type != "cuda":
            return False
        return not (
            torch.is_autocast_enabled("cuda")
            or torch.compiler.is_compiling()
            or "sample" in vars(denoiser)
            or "features" in vars(denoiser)
            or any(m._forward_hooks or m._forward_pre_hooks for m in denoiser.modules())
        )

    def __call__(
        self,
        denoiser: Denoiser,
        cond: Tensor,
        cond_mask: Tensor,
        steps: int | Sequence[int] = 25,
        guidance: float = 3.0,
        seed: int = 0,
        image_indices: Tensor | None = None,
        truncation: float = 1.0,
        purity: float | None = None,
    ) -> Tensor:
        """Draw codes, [B, L] int64; arguments and errors are those of `sample`."""
        levels = check_rule(denoiser.schedule, steps, guidance, truncation, purity=purity)
        rule = tuple(levels), float(guidance), float(truncation), purity
        weights = tuple(each.data_ptr() for each in denoiser.parameters())
        kind = (*cond.shape, cond.dtype, *rule, weights)
        with _turn:
            if kind in self._kept:
                kept = self._kept[kind]
                if kept is None:
                    kept = self._recorded(
                        denoiser, cond, levels, guidance, truncation, purity=purity
                    )
                self._keep(kind, kept)
                if kept:
                    return kept.draw(cond, cond_mask, seed, image_indices)
        codes = denoiser.sample(
            cond, cond_mask, levels, guidance, seed, image_indices, truncation=truncation,
            purity=purity,
        )  # fmt: skip
        with _turn:
            if len(codes) and kind not in self._kept:
                self._keep(kind, None)
        return codes

    def _keep(self, kind: tuple[Any, ...], kept: SamplingGraph | Literal[False] | None) -> None:
        self._kept[kind] = kept
        self._kept.move_to_end(kind)
        while len(self._kept) > self.size:
            _, old = self._kept.popitem(last=False)
            if old:
                old.drawn.synchronize()  # its memory goes to others

    def _recorded(
        self, denoiser: Denoiser, cond: Tensor, levels: list[int], guidance: float,
        truncation: float, purity: float | None,
    ) -> SamplingGraph | Literal[False]:  # fmt: skip
        sampler = Sampler(denoiser, denoiser.schedule, levels, guidance, truncation, purity=purity)
        try:
            return SamplingGraph(sampler, *cond.shape[:2])
        except RuntimeError as error:  # of memory, say: the loop needs less
            warnings.warn(f"sampling runs op by op, without a CUDA graph: {error}", stacklevel=3)
            return False


def sample(
    denoiser: Denoiser,
    schedule: Schedule,
    cond: Tensor,
    cond_mask: Tensor,
    steps: int | Sequence[int] = 25,
    guidance: float = 3.0,
    seed: int = 0,
    truncation: float = 1.0,
    top_k: int = 0,
    temperature: float = 1.0,
    image_indices: Tensor | None = None,
    callback: Callable[[int, int], None] | None = None,
    source: Tensor | None = None,
    start: tuple[Tensor, int] | None = None,
    purity: float | None = None,
) -> Tensor:
    """Draw codes, [B, L] int64: one call of a `Sampler`, whose arguments these are.

    `start` is codes and their level.

    Raises:
        ValueError: as `Sampler`; a seed outside [0, 2^64).
    """
    codes, top = start or (None, None)
    sampler = Sampler(
        denoiser, schedule, steps, guidance, truncation, top_k, temperature, top, purity
    )
    return sampler(cond, cond_mask, seed, image_indices, callback, source, codes)


def check_rule(
    schedule: Schedule,
    steps: int | Sequence[int],
    guidance: float,
    truncation: float = 1.0,
    top_k: int = 0,
    temperature: float = 1.0,
    top: int | None = None,
    purity: float | None = None,
) -> list[int]:
    """The levels that a `Sampler` with these arguments visits.

    Raises:
        ValueError: a bad list of steps, guidance, truncation, top_k, temperature or purity, or
            purity for a schedule that replaces codes, which it would never draw again.
    """
    if not 0.0 < truncation <= 1.0:
        raise ValueError(f"truncation must be in (0, 1], got {truncation}")
    if not math.isfinite(guidance):
        raise ValueError(f"guidance must be finite, got {guidance}")
    if top_k < 0:
        raise ValueError(f"top_k must be >= 0, got {top_k}")
    if not temperature > 0.0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    if purity is not None:
        if not 0 <= purity < math.inf:
            raise ValueError(f"purity must be finite and at least 0, got {purity}")
        if schedule.num_codes * schedule.B[-1] > 1e-3:
            raise ValueError(
                f"purity: sets masked codes alone, the schedule {schedule.name} replaces some"
            )
    return schedule.levels(steps, top)


def signed(seed: int) -> int:
    """The 64 bits of a seed as the int64 that the ops take."""
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be in [0, 2^64), got {seed}")
    return seed - 2**64 if seed >= 2**63 else seed
