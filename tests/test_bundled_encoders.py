"""The embedded encoder and the judge, as they are shipped."""

from pathlib import Path

import numpy as np
import pytest

import knnfast
from knnfast.encoders import load_encoder

BUNDLE = Path(knnfast.__file__).parent / "bundles" / "stickers"


@pytest.mark.parametrize("name", ["encoder", "judge"])
def test_bundled(name):
    encoder = load_encoder(BUNDLE / name)
    rows = encoder.encode_text(["a red heart", "zebra", "kitten"]).vectors
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    size = sum(path.stat().st_size for path in (BUNDLE / name).iterdir())
    assert size < {"encoder": 10e6, "judge": 5.5e6}[name]


@pytest.mark.parametrize(
    ("word", "near", "far"),
    [
        ("kitten", "cat", "elevator"),
        ("xmas", "Christmas", "hammer"),
        ("lorry", "truck", "banana"),
        ("elefant", "elephant", "telephone"),
        ("giraffes", "giraffe", "window"),
        ("strawbery", "strawberry", "car"),
    ],
)
def test_bundled_encoder_understands(word, near, far):
    rows = load_encoder(BUNDLE / "encoder").encode_text([word, near, far]).vectors
    assert rows[0] @ rows[1] > rows[0] @ rows[2] + 0.2


def test_bundled_ones_share_nothing():
    first, second = load_encoder(BUNDLE / "encoder"), load_encoder(BUNDLE / "judge")
    assert first.card.sha256 != second.card.sha256
    assert type(first.tower.trunk) is not type(second.tower.trunk)
