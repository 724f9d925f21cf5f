"""Shared by tests: compilers, the one check of an answer, hard rows."""

import subprocess

import numpy as np
import torch

from knnfast import reference


def compile_c(code, path, *libraries):
    """A shared library at `path`; returns its name."""
    return compiled("cc", code, path, ".c", *libraries)


def compile_cpp(code, path):
    """A shared library at `path`; returns its name."""
    return compiled("c++", code, path, ".cpp", "-std=c++17")


def compiled(compiler, code, path, suffix, *options):
    source = path.with_suffix(suffix)
    source.write_text(code)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", path, source, *options], check=True)
    return str(path)


def assert_topk(index, x, q, k, ids=None, **filters):
    """Scores and ids equal the reference's, bit for bit."""
    want_s, want_i = reference.topk(torch.as_tensor(q), torch.as_tensor(x), k, index.metric, ids)
    scores, found = index.search(q, k, **filters)
    np.testing.assert_array_equal(found, want_i.numpy())
    np.testing.assert_array_equal(scores, want_s.numpy())


def rows_of_all_sizes(rng, n, d):
    """Rows as FP16 can hold them, with zeros, one large element, a shared mean."""
    x = rng.standard_normal((n, d))
    x *= 2.0 ** rng.integers(-24, 13, (n, 1))
    x[3] = 0
    x[5] = 6e4 * rng.choice([-1, 1], d)
    x[7, 0] = 6.5e4
    x[n // 2 :] += 4
    return x.astype(np.float16)
