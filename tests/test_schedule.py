"""Schedules: the three presets, their identities, and the strided mixture against brute force."""

import numpy as np
import pytest

from knnfast.diffusion.schedule import NAMES, Schedule
from knnfast.ops import reference


def stride(schedule: Schedule, t: int, s: int) -> tuple[float, float, float]:
    return reference.stride(schedule.A, schedule.B, schedule.C, t, s)


def one_step_matrices(schedule: Schedule) -> list[np.ndarray]:
    """Q_t for t = 1...T over K + 1 states, column = from, straight from the definition."""
    k = schedule.num_codes
    out = []
    for t in range(1, schedule.num_steps + 1):
        a, b, c = stride(schedule, t, t - 1)
        q = np.zeros((k + 1, k + 1))
        q[:k, :k] = b
        q[np.arange(k), np.arange(k)] += a
        q[k, :k] = c
        q[k, k] = 1.0
        out.append(q)
    return out


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("steps", [2, 7, 100])
def test_identities(name: str, steps: int) -> None:
    s = Schedule(name, steps, num_codes=13)
    assert (s.A[0], s.B[0], s.C[0]) == (1.0, 0.0, 0.0)
    np.testing.assert_allclose(s.A + 13 * s.B + s.C, 1.0, atol=1e-15)
    assert (np.diff(s.A) < 0).all()
    assert (np.diff(s.C) > 0).all()
    assert (s.B >= 0).all()


def test_presets() -> None:
    published = Schedule("vq_diffusion", 100, 512)
    np.testing.assert_allclose(512 * published.B[1:], 1e-6, rtol=1e-6)
    assert published.C[-1] == pytest.approx(0.99999)
    replace = Schedule("mask_replace", 100, 512)
    assert (replace.A[-1], replace.C[-1]) == (0.0, 0.9)
    assert 512 * replace.B[-1] == pytest.approx(0.1)
    assert not Schedule("mask", 100, 512).B.any()


@pytest.mark.parametrize("name", NAMES)
def test_strides_compose(name: str) -> None:
    """The product of one-step matrices is the stride's matrix, and from 0 it is (A, B, C)."""
    s = Schedule(name, 20, num_codes=5)
    q = one_step_matrices(s)
    for low, high in [(0, 20), (0, 1), (3, 4), (2, 11), (7, 20)]:
        product = np.linalg.multi_dot([*reversed(q[low:high]), np.eye(6)])
        a, b, c = stride(s, high, low)
        np.testing.assert_allclose(product[1, 0], b, atol=1e-14)
        np.testing.assert_allclose(product[0, 0], a + b, atol=1e-14)
        np.testing.assert_allclose(product[5, 0], c, atol=1e-14)
    a, b, c = stride(s, 9, 0)
    np.testing.assert_allclose([a, b, c], [s.A[9], s.B[9], s.C[9]], atol=1e-15)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 20), (4, 9), (13, 20), (19, 20)])
def test_mixture_is_the_posterior(name: str, low: int, high: int) -> None:
    """The step's mixture equals sum_x0 q(x_s | x_t, x_0) p(x_0), from Bayes and the matrices."""
    import torch

    k = 6
    s = Schedule(name, 20, k)
    q = one_step_matrices(s)
    to_s = np.linalg.multi_dot([*reversed(q[:low]), np.eye(k + 1), np.eye(k + 1)])
    s_to_t = np.linalg.multi_dot([*reversed(q[low:high]), np.eye(k + 1), np.eye(k + 1)])
    p = np.random.default_rng(low * 100 + high).dirichlet(np.full(k, 0.5))
    weights = reference.transition_weights(s, high, low, k)
    for x_t in range(k + 1):
        want = np.zeros(k + 1)
        if s.B[high] == 0.0 and x_t < k:
            want[x_t] = 1.0  # without replacement a real code is the data's own
        else:
            for x0 in range(k):
                joint = to_s[:, x0] * s_to_t[x_t, :]
                want += p[x0] * joint / joint.sum()
        got = reference.transition_distribution(
            torch.from_numpy(np.log(p))[None], torch.tensor([x_t]), weights
        )[0].numpy()
        np.testing.assert_allclose(got, want, atol=5e-9 if name == "vq_diffusion" else 1e-12)


def test_levels() -> None:
    s = Schedule("mask", 100, 4)
    assert s.levels(100) == list(range(100, -1, -1))
    assert s.levels(25) == list(range(100, -1, -4))
    assert s.levels(7) == [100, 86, 71, 57, 43, 29, 14, 0]
    assert s.levels([100, 60, 3]) == [100, 60, 3, 0]
    assert s.levels(np.int64(100)) == s.levels(100)
    for strange in (True, None, 1.5, "7", [100, 0.5]):
        with pytest.raises(TypeError, match="steps: a whole number or a list of levels"):
            s.levels(strange)
    for bad in (0, 101, [], [99, 0], [100, 50, 50, 0], [100, 0, -1]):
        with pytest.raises(ValueError, match="steps must"):
            s.levels(bad)


def test_rejects() -> None:
    with pytest.raises(ValueError, match="schedule must be one of"):
        Schedule("linear", 10, 4)
    with pytest.raises(ValueError, match="num_steps must be >= 2"):
        Schedule("vq_diffusion", 1, 4)
    with pytest.raises(ValueError, match="num_codes must be >= 1"):
        Schedule("mask", 10, 0)
    for t, s in ((5, 5), (4, 5), (11, 5), (5, -1)):
        with pytest.raises(ValueError, match="levels must satisfy 0 <= s < t <= 10"):
            reference.transition_weights(Schedule("mask", 10, 4), t, s, 4)
    with pytest.raises(TypeError, match=r"t: must be an integer, got 5\.0"):
        reference.transition_weights(Schedule("mask", 10, 4), 5.0, 4, 4)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="schedule: must have A, B and C, got None"):
        reference.transition_weights(None, 5, 4, 4)  # type: ignore[arg-type]


def test_weights_are_of_the_schedules_codes() -> None:
    with pytest.raises(ValueError, match="schedule: is of 4 codes, not of 5"):
        reference.transition_weights(Schedule("mask", 10, 4), 5, 4, 5)
