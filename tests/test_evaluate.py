"""Metrics on cases with known answers, and the evaluation on a world one can reason about."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from knnfast import _files
from knnfast.encoders import Embeddings, Encoder, EncoderCard
from knnfast.evaluate import evaluate, held_out, report
from knnfast.fid import fid
from knnfast.metrics import (
    bootstrap_interval,
    cmmd,
    mean_score,
    nearest_distance,
    pixel_distance,
    r_precision,
)


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


# -- metrics


def test_held_out_is_a_fixed_tenth():
    names = [f"sticker {i}" for i in range(5000)]
    chosen = [held_out(name) for name in names]
    assert 0.08 < np.mean(chosen) < 0.12
    assert [held_out(name) for name in names] == chosen
    assert not any(held_out(name, 0.0) for name in names)
    assert all(held_out(name, 1.0) for name in names)
    # The first sixteen bits of SHA-256("abc") are ba78 (FIPS 180-2): its share is 0.7284...
    assert not held_out("abc", 0.72)
    assert held_out("abc", 0.73)


def test_r_precision_counts_ranks():
    texts = np.eye(4)
    images = np.array([[0.9, 0.8, 0.7, 0.1], [0.9, 0.8, 0.7, 0.1], [0.9, 0.8, 0.7, 0.1]])
    right = np.array([0, 1, 3])
    assert r_precision(images, texts, right, 1).tolist() == [1, 0, 0]
    assert r_precision(images, texts, right, 2).tolist() == [1, 1, 0]
    assert r_precision(images, texts, right, 3).tolist() == [1, 1, 0]
    assert r_precision(images, texts, right, 4).tolist() == [1, 1, 1]


def test_r_precision_ties_go_to_the_lower_row():
    texts = np.ones((3, 1))
    assert r_precision(np.ones((3, 1)), texts, np.arange(3), 1).tolist() == [1, 0, 0]
    assert r_precision(np.ones((3, 1)), texts, np.arange(3), 2).tolist() == [1, 1, 0]


def test_r_precision_of_noise_is_chance():
    rng = np.random.default_rng(0)
    images, texts = unit(rng.normal(size=(4000, 32))), unit(rng.normal(size=(200, 32)))
    hits = r_precision(images, texts, rng.integers(0, 200, 4000), 10)
    assert abs(hits.mean() - 10 / 200) < 0.012  # 3.5 standard deviations


@pytest.mark.parametrize("k", [0, 4])
def test_r_precision_rejects(k):
    with pytest.raises(ValueError, match="k must be between 1 and 3"):
        r_precision(np.eye(3), np.eye(3), np.arange(3), k)


def test_mean_score():
    assert mean_score(np.eye(3), np.eye(3)) == 1
    assert mean_score(np.eye(3), np.roll(np.eye(3), 1, axis=0)) == 0
    assert mean_score(np.eye(2), -np.eye(2)) == -1


def test_cmmd_by_hand():
    """Two points on each side, all distances known."""
    x, y = np.array([[0.0], [1.0]]), np.array([[3.0], [5.0]])
    k = lambda d: np.exp(-(d**2) / (2 * 4.0))  # noqa: E731
    expected = k(1) + k(2) - 2 * (k(3) + k(5) + k(2) + k(4)) / 4
    np.testing.assert_allclose(cmmd(x, y, sigma=2.0, scale=7.0), 7 * expected, rtol=1e-12)


def test_cmmd_of_gaussians():
    """In closed form: 2 s^D (1 - exp(-d^2 / (2 (sigma^2 + 2)))), s^2 = sigma^2 / (sigma^2 + 2)."""
    rng = np.random.default_rng(1)
    sigma, shift, dim = 2.0, 1.5, 3
    x = rng.normal(size=(3000, dim))
    y = rng.normal(size=(3000, dim)) + np.array([shift, 0, 0])
    scale = (sigma**2 / (sigma**2 + 2)) ** (dim / 2)
    expected = 2 * scale * (1 - np.exp(-(shift**2) / (2 * (sigma**2 + 2))))
    np.testing.assert_allclose(cmmd(x, y, sigma, 1.0), expected, rtol=0.08)


def test_cmmd_is_unbiased():
    """Two samples of one distribution: zero on average, also for few rows."""
    rng = np.random.default_rng(2)
    values = [
        cmmd(unit(rng.normal(size=(8, 5))), unit(rng.normal(size=(6, 5))), 1.0) for _ in range(2000)
    ]
    error = np.std(values) / np.sqrt(len(values))
    assert abs(np.mean(values)) < 4 * error
    assert min(values) < 0


def test_cmmd_rejects():
    with pytest.raises(ValueError, match="two rows"):
        cmmd(np.zeros((1, 3)), np.zeros((5, 3)))


def test_nearest_distance():
    database = np.eye(3)
    x = np.array([[0, 1, 0], [-1, 0, 0], [0.6, 0.8, 0]])
    np.testing.assert_allclose(nearest_distance(x, database), [0, 1, 0.2], atol=1e-12)


def test_pixel_distance():
    database = np.zeros((2, 2, 2, 3), np.uint8)
    database[1] = 255
    x = np.stack([database[1], np.full((2, 2, 3), 51, np.uint8)])
    np.testing.assert_allclose(pixel_distance(x, database), [0, 0.2], atol=1e-9)


def test_bootstrap_interval():
    assert bootstrap_interval(np.ones(50)) == (1, 1)
    rng = np.random.default_rng(3)
    covered = 0
    for trial in range(200):
        low, high = bootstrap_interval(rng.normal(size=60), rounds=500, seed=trial)
        covered += low <= 0 <= high
        assert low < high
    assert 0.88 < covered / 200 < 0.99
    values = rng.normal(size=100)
    assert bootstrap_interval(values) == bootstrap_interval(values)


@pytest.mark.filterwarnings("ignore:Failed to load image")  # of a torchvision for another torch
def test_fid_of_known_features():
    """Against the formula in FP64, on the mean colours of pictures."""

    pytest.importorskip("torchmetrics")

    class Colours(torch.nn.Module):
        def forward(self, x):
            return x.double().mean((2, 3)) / 255

    rng = np.random.default_rng(4)
    mix = np.array([[1.0, 0.3, 0], [0, 0.5, 0.2], [0, 0, 0.7]])
    sets = [rng.normal(size=(300, 3)) @ mix * 20 + 120, rng.normal(size=(200, 3)) * 15 + 100]
    x, y = (np.tile(s.clip(0, 255).astype(np.uint8)[:, None, None], (1, 4, 4, 1)) for s in sets)
    a, b = (v[:, 0, 0].astype(np.float64) / 255 for v in (x, y))
    roots = np.linalg.eigvals(np.cov(a.T) @ np.cov(b.T)).real.clip(0) ** 0.5
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum()
    expected += np.trace(np.cov(a.T)) + np.trace(np.cov(b.T)) - 2 * roots.sum()
    np.testing.assert_allclose(fid(x, y, features=Colours()), expected, rtol=1e-4)


def test_fid_without_weights_says_so(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"FID: no Inception weights at .*nowhere\.pth"):
        fid(np.zeros((2, 4, 4, 3), np.uint8), np.zeros((2, 4, 4, 3), np.uint8), "nowhere.pth")
    pipe = Pipe(lambda number, database, neighbours: number)
    with pytest.raises(FileNotFoundError, match=r"no Inception weights at .*nowhere\.pth"):
        evaluate(pipe, Knowing(230, 2), prompts=12, inception="nowhere.pth")
    assert pipe.calls == []  # what is asked for by name is looked for first
    monkeypatch.setattr("torch.hub.get_dir", lambda: tmp_path)
    result, _ = run(lambda number, database, neighbours: number)
    assert "no Inception weights" in result["fid"]["not_available"]
    assert "not available: FID: no Inception weights" in report(result)


# -- a world where every sticker is a colour and an encoder knows them by heart


class Knowing(Encoder):
    """Maps picture i and name i to its own random vector i."""

    def __init__(self, count, seed):
        self.card = EncoderCard(f"knowing {seed}", 24, f"{seed:064x}", 8)
        self.rows = unit(np.random.default_rng(seed).normal(size=(count, 24))).astype(np.float32)

    def encode_images(self, images, batch_size=64):
        return Embeddings(self.rows[[image.getpixel((0, 0))[0] for image in images]], self.card)

    def encode_text(self, texts):
        return Embeddings(self.rows[[int(text.split()[1]) for text in texts]], self.card)


def picture(number):
    return Image.new("RGB", (8, 8), (number, 255 - number, 7))


class Shelf:
    """What `evaluate` needs of a Database."""

    def __init__(self, numbers, encoder):
        self.items = [SimpleNamespace(id=i, name=f"thing {n}") for i, n in enumerate(numbers)]
        self.numbers, self.encoder = list(numbers), encoder

    def __iter__(self):
        return iter(self.items)

    def __len__(self):
        return len(self.items)

    def thumbnail(self, number):
        return picture(self.numbers[number])

    def search(self, queries, k):
        scores = queries.vectors @ self.encoder.rows[self.numbers].T
        best = np.argsort(-scores, axis=1)[:, :k]
        return [[SimpleNamespace(item=self.items[i]) for i in row] for row in best]


class Pipe:
    """A generator that draws what `choose(number, database, use_neighbours)` tells it."""

    device = torch.device("cpu")

    def __init__(self, choose):
        self.encoder = Knowing(230, 1)
        self.databases = {
            "stickers": Shelf(range(200), self.encoder),
            "animals": Shelf(range(200, 230), self.encoder),
        }
        self.choose, self.calls = choose, []
        identity = SimpleNamespace(image_size=8, encode=lambda x: x, decode=lambda x: x)
        self.tokenizer = identity
        self.denoiser = torch.nn.Linear(2, 2)
        torch.nn.init.ones_(self.denoiser.weight)
        torch.nn.init.zeros_(self.denoiser.bias)

    def __call__(self, prompts, **options):
        self.calls.append((tuple(prompts), options))
        images = [
            picture(
                self.choose(int(prompt.split()[1]), options["database"], options["use_neighbours"])
            )
            for prompt in prompts
            for _ in range(options["num_images"])
        ]
        return SimpleNamespace(images=images)


def run(choose, **options):
    pipe = Pipe(choose)
    options = {"prompts": 30, "other_prompts": 10, "other_samples": 2, "batch": 7, **options}
    return evaluate(pipe, Knowing(230, 2), **options), pipe


def test_a_perfect_generator():
    result, _ = run(lambda number, database, neighbours: number)
    for values in result["generated"].values():
        for label in ("judge", "encoder"):
            assert values[label]["r_precision@1"] == 1
            assert values[label]["r_precision@10_held_out"] == 1
            assert values[label]["score"] == pytest.approx(1)
            assert values[label]["nearest_distance"] == pytest.approx(0, abs=1e-6)
        assert values["nearest_pixel_distance"] == pytest.approx(0, abs=1e-6)
    for bound in ("nearest_picture", "tokenizer", "real"):
        assert result["bounds"][bound]["judge"]["r_precision@1"] == 1
    real = result["bounds"]["real"]["judge"]
    assert real["score"] > real["score_shuffled"] + 0.5
    assert result["out_of_distribution"]["share_by_database"]["animals"]["mean"] == 1
    assert result["out_of_distribution"]["share_by_database"]["stickers"]["mean"] == 1
    assert result["out_of_distribution"]["difference"]["mean"] == 0


def test_a_wrong_generator():
    result, _ = run(lambda number, database, neighbours: (number + 1) % 200)
    values = result["generated"]["query_only"]["judge"]
    assert values["r_precision@1"] == 0
    assert values["r_precision@10"] < 0.3
    assert values["score"] < 0.3


def test_modes_and_databases_reach_the_generator():
    def choose(number, database, neighbours):
        if database == "animals":
            return 229
        return number if neighbours else (number + 1) % 200

    result, pipe = run(choose)
    generated = result["generated"]
    assert generated["neighbours_and_query"]["judge"]["r_precision@1"] == 1
    assert generated["neighbours_only"]["judge"]["r_precision@1"] == 1
    assert generated["query_only"]["judge"]["r_precision@1"] == 0
    out = result["out_of_distribution"]
    assert out["share_by_database"]["animals"]["mean"] == 1
    modes = {(o["use_query"], o["use_neighbours"]) for _, o in pipe.calls}
    assert modes == {(True, True), (True, False), (False, True)}


def test_swapping_the_database_is_what_the_difference_measures():
    result, _ = run(lambda number, database, neighbours: 210 if database == "animals" else 3)
    out = result["out_of_distribution"]
    assert out["share_by_database"]["animals"] == {"mean": 1, "interval": [1, 1]}
    assert out["share_by_database"]["stickers"] == {"mean": 0, "interval": [0, 0]}
    assert out["difference"] == {"mean": 1, "interval": [1, 1]}


def test_prompts_are_fixed_and_split():
    result, pipe = run(lambda number, database, neighbours: number)
    again, other = run(lambda number, database, neighbours: number)
    assert pipe.calls == other.calls
    result.pop("seconds"), again.pop("seconds")
    assert result == again
    settings = result["settings"]
    per_mode = [p for prompts, o in pipe.calls if not o["use_query"] for p in prompts]
    assert len(per_mode) == len(set(per_mode)) == 30
    assert settings["prompts_training"] + settings["prompts_held_out"] == 30
    assert sum(held_out(name) for name in per_mode) == settings["prompts_held_out"] > 5
    assert all(int(name.split()[1]) < 200 for name in per_mode)
    _, seeded = run(lambda number, database, neighbours: number, seed=1)
    assert seeded.calls != pipe.calls


def test_a_model_with_one_database():
    """As `knnfast train` makes it: no picture is held out, and there is none of another kind."""
    pipe = Pipe(lambda number, database, neighbours: number if neighbours else number + 1)
    pipe.databases = {"training": Shelf(range(100), pipe.encoder)}
    seen = []
    result = evaluate(pipe, Knowing(230, 2), prompts=12, progress=lambda *at: seen.append(at))
    assert seen[-1] == (3 * 12,) * 2
    assert {o["database"] for _, o in pipe.calls} == {"training"}
    assert result["settings"]["prompts_training"] == 12
    assert result["settings"]["prompts_held_out"] == 0
    assert result["settings"]["names"] == 100
    for mode, right in (("neighbours_and_query", 1), ("query_only", 0)):
        assert result["generated"][mode]["judge"]["r_precision@1"] == right
    assert "out_of_distribution" not in result
    assert "held_out" not in json.dumps({k: result[k] for k in ("generated", "bounds")})
    assert json.loads(json.dumps(result)) == result
    assert "unseen kind" not in report(result)


def test_without_k_a_small_database_gives_what_it_has():
    pipe = Pipe(lambda number, database, neighbours: number)
    pipe.databases["animals"] = Shelf(range(200, 207), pipe.encoder)
    options = {"prompts": 4, "other_prompts": 2, "other_samples": 1}
    assert evaluate(pipe, Knowing(230, 2), **options)["settings"]["k"] == 7
    assert {o["k"] for _, o in pipe.calls} == {7}
    with pytest.raises(ValueError, match=r"k: must be 1 ... 7 .*, got 8"):
        evaluate(pipe, Knowing(230, 2), k=8, **options)


THINGS = [f"thing {n}" for n in range(11)]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([f"thing {n}" for n in range(9)], "database 'training': 9 images, fewer than 10"),
        ([*(f"thing {n}" for n in range(11)), " "], "'training': an image without a name"),
        (
            [*(f"thing {n}" for n in range(11)), "thing 3"],
            "'training': two images called 'thing 3'",
        ),
        (
            [*(f"thing {n}" for n in range(11)), "IMG"],
            "encoder 'knowing 1': no word in 'IMG'; names are the prompts",
        ),
    ],
)
def test_names_that_cannot_be_prompts(names, message, monkeypatch):
    def encode_text(self, texts):
        if "IMG" in texts:
            raise ValueError("no word in 'IMG'")
        return Embeddings(self.rows[: len(texts)], self.card)

    monkeypatch.setattr(Knowing, "encode_text", encode_text)
    pipe = Pipe(None)
    shelf = Shelf(range(len(names)), pipe.encoder)
    for item, name in zip(shelf.items, names, strict=True):
        item.name = name
    pipe.databases = {"training": shelf}
    with pytest.raises(ValueError, match=message):
        evaluate(pipe, Knowing(230, 2), prompts=4)
    assert pipe.calls == []


def test_names_that_find_their_own_picture_are_counted():
    """Text i is picture i in `Knowing`; a third of the names is made to find another's."""

    class Blurred(Knowing):
        def encode_text(self, texts):
            numbers = [int(text.split()[1]) for text in texts]
            rows = [(n + 1) % 200 if n % 3 == 0 else n for n in numbers]
            return Embeddings(self.rows[rows], self.card)

    pipe = Pipe(lambda number, database, neighbours: number)
    pipe.encoder = Blurred(230, 1)
    result = evaluate(pipe, Knowing(230, 2), prompts=60, other_prompts=2, batch=7, k=1)
    asked = {name for prompts, o in pipe.calls if not o["use_query"] for name in prompts}
    other = {name for name in asked if int(name.split()[1]) % 3 == 0}
    unseen = {name for name in asked if held_out(name)}
    assert result["settings"]["batch"] == 7
    share = 1 - len(other) / 60
    assert 0.5 < share < 0.9
    assert result["own_picture"] == pytest.approx(
        {
            "first": share,
            "among": share,
            "among_held_out": 1 - len(other & unseen) / len(unseen),
        }
    )
    assert f"own picture: the first found for {share:.1%} of the names, among the 1" in report(
        result
    )


def test_result_is_json_and_prints():
    seen = []
    result, _ = run(
        lambda number, database, neighbours: number,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert json.loads(json.dumps(result)) == result
    assert seen[-1] == (3 * 30 + 2 * 10 * 2,) * 2
    text = report(result)
    assert "by the judge" in text
    assert "neighbours_only" in text


def test_the_measured_checkpoint_is_named():
    result, pipe = run(lambda number, database, neighbours: number)
    assert result["settings"]["denoiser_sha256"] == _files.weights_hash(pipe.denoiser)
    with torch.no_grad():
        pipe.denoiser.bias[0] = 1
    assert result["settings"]["denoiser_sha256"] != _files.weights_hash(pipe.denoiser)


def test_evaluate_rejects():
    pipe = Pipe(lambda number, database, neighbours: number)
    with pytest.raises(ValueError, match="is the encoder that conditions"):
        evaluate(pipe, pipe.encoder)
    with pytest.raises(ValueError, match="no database 'plants'"):
        evaluate(pipe, Knowing(230, 2), other="plants")
    with pytest.raises(ValueError, match="prompts: must be at least 4, got 2"):
        evaluate(pipe, Knowing(230, 2), prompts=2)
    with pytest.raises(ValueError, match=r"seed: must be 0 \.\.\. \d+, got -1"):
        evaluate(pipe, Knowing(230, 2), seed=-1)
    with pytest.raises(ValueError, match=r"judge: the embedded one .* encoder is 'knowing 1'"):
        evaluate(pipe)
    assert pipe.calls == []
    pipe.databases["animals"] = pipe.databases["stickers"]
    with pytest.raises(ValueError, match="'animals': two images called 'thing 0'"):
        evaluate(pipe, Knowing(230, 2))
