"""Queries and databases at call time: mixes, interpolation, embeddings, filters."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from knnfast import Database, KNNDiffusion
from knnfast._calls import choose_neighbours
from knnfast.encoders import Embeddings, EncoderCard
from knnfast.mixture import Mixture
from knnfast.query import Query, as_queries, between, embed, mix

CARD = EncoderCard("toy", 3, "ab" * 32, 8)


class Toy:
    """Texts are looked up; a picture is its mean colour."""

    card, dim = CARD, 3
    words = {"x": [1, 0, 0], "y": [0, 1, 0], "z": [0, 0, 1], "minus x": [-1, 0, 0]}

    def __init__(self):
        self.texts = self.images = 0

    def encode_text(self, texts):
        self.texts += len(texts)
        return Embeddings(np.array([self.words[t] for t in texts], np.float32), CARD)

    def encode_images(self, images):
        self.images += len(images)
        rows = np.array([np.asarray(i, np.float32).mean((0, 1)) for i in images])
        return Embeddings(rows / np.linalg.norm(rows, axis=1, keepdims=True), CARD)


def red():
    return Image.new("RGB", (4, 4), (255, 0, 0))


def embedded(*queries):
    return embed(list(queries), Toy()).vectors


def test_mix_is_the_unit_weighted_sum(tmp_path):
    np.testing.assert_allclose(embedded(mix(("x", 3.0), ("y", 4.0)))[0], [0.6, 0.8, 0], atol=1e-6)
    np.testing.assert_allclose(embedded(mix(("x", 1), ("y", -1)))[0], [0.5**0.5, -(0.5**0.5), 0])
    red().save(tmp_path / "red.png")
    several = mix((tmp_path / "red.png", 1.0), ("y", 1.0), (np.array([0.0, 0.0, 7.0]), 1.0))
    np.testing.assert_allclose(embedded(several)[0], np.full(3, 3**-0.5), atol=1e-6)
    nested = mix((mix(("x", 1.0), ("y", 1.0)), 1.0), ("z", 1.0))
    np.testing.assert_allclose(embedded(nested)[0], [0.5, 0.5, 0.5**0.5], atol=1e-6)


def test_between_goes_round_the_sphere_in_equal_angles():
    rows = embedded(*between("x", "y", 5)).astype(np.float64)
    angles = np.degrees(np.arctan2(rows[:, 1], rows[:, 0]))
    np.testing.assert_allclose(angles, [0, 22.5, 45, 67.5, 90], atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(embedded(*between("x", "x", 3)), [[1, 0, 0]] * 3)


def test_every_text_and_picture_is_encoded_once():
    toy, picture = Toy(), red()
    embed([*between("x", "y", 9), mix(("x", 1.0), (picture, 1.0)), mix((picture, 1.0))], toy)
    assert (toy.texts, toy.images) == (2, 1)


def test_a_picture_does_not_see_the_others(pipe):
    shown = [pipe.database.thumbnail(int(i)) for i in pipe.database.ids[:5]]
    together = embed(as_queries(None, shown, None, None, pipe.encoder), pipe.encoder).vectors
    for row, picture in zip(together, shown, strict=True):
        alone = embed(as_queries(None, picture, None, None, pipe.encoder), pipe.encoder).vectors
        np.testing.assert_array_equal(alone[0], row)


def test_as_queries_names_them():
    toy = Toy()

    def labels(prompt=None, image=None, embedding=None):
        return [q.label for q in as_queries(prompt, image, None, embedding, toy)]

    assert labels("x") == ["x"]
    assert labels(["x", mix(("x", 0.5), ("y", 2))]) == ["x", "0.5 x + 2 y"]
    assert labels(image=[red(), red()]) == ["image 1", "image 2"]
    assert labels(["x"], [red()]) == ["x"]
    assert labels(embedding=np.eye(3)) == ["embedding 1", "embedding 2", "embedding 3"]
    assert labels(between("x", Path("a/boat.png"), 2)) == ["x to boat 0.00", "x to boat 1.00"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mix(), "at least one"),
        (lambda: mix(("x", float("nan"))), "a weight must lie within"),
        (lambda: mix(("x", 1e31)), "a weight must lie within"),
        (lambda: mix(("x", 10**400)), "a weight: must be within the range of a float"),
        (lambda: mix(("x", 1), label=3), "label: expected a text, got 3"),
        (lambda: mix((np.eye(3), 1)), r"mix: an embedding must be \[E\], got \[3, 3\]"),
        (lambda: between("x", "y", 2.0), "count: expected a whole number, got 2.0"),
        (lambda: as_queries({"x": 1}, None, None, None, Toy()), "prompt: expected one, .* dict"),
        (lambda: as_queries(None, None, None, "x", Toy()), "embedding: expected numbers, got 'x'"),
        (lambda: mix(("x", "heavy")), "number"),
        (lambda: mix(("", 1.0)), "word"),
        (lambda: mix((3, 1.0)), "mix: expected a text, .*, got int"),
        (lambda: between("x", 3, 4), "b: expected a text, .*, got int"),
        (lambda: as_queries(b"x", None, None, None, Toy()), "prompt: expected one, .*, got bytes"),
        (lambda: between("x", "y", 1), "count"),
        (lambda: embedded(mix(("x", 1.0), ("x", -1.0))), "cancel"),
        (lambda: embedded(*between("x", "minus x", 3)), "opposite"),
        (lambda: embedded(mix((np.zeros(4), 1.0))), r"must be \[3\]"),
        (lambda: embedded(mix((np.full(3, np.nan), 1.0))), "NaN"),
        (lambda: as_queries(None, None, None, np.zeros((2, 2, 3)), Toy()), "must be"),
        (lambda: as_queries("x", None, None, np.eye(3), Toy()), "alone"),
        (lambda: as_queries(None, None, None, None, Toy()), "got none"),
        (lambda: as_queries("x", None, 0.5, None, Toy()), "give both"),
        (lambda: as_queries(None, red(), 0.5, None, Toy()), "give both"),
        (lambda: as_queries(["x", "y"], [red()], 0.5, None, Toy()), "beside 2"),
        (lambda: mix("a"), r"mix: a part must be a pair \(what, weight\), got 'a'"),
        (
            lambda: as_queries(
                None, None, None, Embeddings(np.eye(3), EncoderCard("b", 3, "c", 8)), Toy()
            ),
            "'b', not by 'toy'",
        ),
    ],
)
def test_rejects(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


# ---- databases ----------------------------------------------------------------------------------


def toy_database(name, rows, group=""):
    db = Database(CARD, thumbnail_size=4)
    rows = np.asarray(rows, np.float32)
    db.add(
        Embeddings(rows / np.linalg.norm(rows, axis=1, keepdims=True), CARD),
        [red()] * len(rows),
        names=[f"{name}{i}" for i in range(len(rows))],
        groups=[group or name] * len(rows),
    )
    return db


def test_mixture_gives_each_database_its_share():
    near = toy_database("near", [[1, 0.01 * i, 0] for i in range(10)])
    far = toy_database("far", [[1, 0.3 + 0.01 * i, 0] for i in range(10)])
    both = Mixture({near: 3.0, far: 1.0})
    assert [both.counts(k) for k in (1, 2, 4, 7, 10)] == [[1, 0], [2, 0], [3, 1], [5, 2], [8, 2]]
    (found,) = both.search(Toy().encode_text(["x"]), 8)
    assert [n.item.name for n in found] == [*(f"near{i}" for i in range(6)), "far0", "far1"]
    ids = [n.item.id for n in found]
    assert len(set(ids)) == 8
    assert [both[i].name for i in ids] == [n.item.name for n in found]
    want = np.concatenate([near.vectors(range(6)), far.vectors([0, 1])])
    np.testing.assert_array_equal(both.vectors(ids), want)
    assert both.vectors([]).shape == (0, 3)
    assert [n.item.name for n in both.best(found, 4)] == ["near0", "near1", "near2", "far0"]
    nears = [n for n in found if n.item.name.startswith("near")]
    assert both.best(nears, 4) == nears[:4]
    assert both.thumbnail(ids[7]).size == (4, 4)
    assert both.groups == {"far": 10, "near": 10}
    assert len(both) == 20


def test_mixture_ties_and_filters():
    a, b = toy_database("a", np.eye(3)), toy_database("b", np.eye(3))
    both = Mixture({a: 1.0, b: 1.0})
    allow = both.ids_of(where=lambda item: item.name not in ("a0", "b1"))
    (found,) = both.search(Toy().encode_text(["x"]), 3, allow=allow)
    assert found[0].item.name == "b0"
    assert {n.item.name for n in found} == {"b0", "a1", "a2"}
    with pytest.raises(ValueError, match="3 neighbours are asked"):
        both.search(Toy().encode_text(["x"]), 6, allow=allow)


def test_mixture_rejects():
    a = toy_database("a", np.eye(3))
    other = Database(EncoderCard("other", 3, "cd" * 32, 8))
    for weights, message in (
        ({}, "at least one"),
        ({a: -1.0}, "at least 0"),
        ({a: float("inf")}, "at least 0"),
        ({a: 0.0}, "all weights are 0"),
        ({a: 1.0, other: 1.0}, "'toy'"),
    ):
        with pytest.raises(ValueError, match=message):
            Mixture(weights)
    with pytest.raises(TypeError, match="database: a weight: expected a number, got 'x'"):
        Mixture({a: "x"})


def test_ids_of_filters_by_group_and_item():
    db = toy_database("a", np.eye(3), group="g")
    assert db.ids_of().tolist() == [0, 1, 2]
    assert db.ids_of(["g"], lambda item: item.name > "a0").tolist() == [1, 2]
    with pytest.raises(ValueError, match="nowhere"):
        db.ids_of(["nowhere"])


# ---- the pipeline -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipe():
    return KNNDiffusion.from_pretrained("stickers")


def names(output, row=0):
    return [n.item.name for n in output.neighbours[row]]


def test_call_takes_mixes_embeddings_and_filters(pipe):
    quick = {"steps": 1, "seed": 0, "k": 4}
    out = pipe(between("a red heart", "pizza", 3), **quick)
    assert "heart" in names(out)[0]
    assert names(out, 2)[0] == "pizza"
    assert out.labels[1] == "a red heart to pizza 0.50"
    row = pipe.encoder.encode_text(["pizza"])
    assert names(pipe(embedding=row, **quick)) == names(pipe("pizza", **quick))
    assert names(pipe(embedding=row.vectors[0], **quick)) == names(pipe("pizza", **quick))
    only = names(pipe("pizza", where=lambda item: item.name.startswith("hot "), **quick))
    assert all(name.startswith("hot ") for name in only)
    with pytest.raises(ValueError, match="what the filter leaves"):
        pipe("pizza", where=lambda item: item.name == "pizza", **quick)


def test_without_k_there_are_ten_or_as_many_as_there_are(pipe):
    def few(item):
        return item.name in ("pizza", "hot dog", "rocket")

    quick = {"steps": 1, "seed": 0}
    assert len(names(pipe("pizza", **quick))) == 10
    assert set(names(pipe("pizza", where=few, **quick))) == {"pizza", "hot dog", "rocket"}
    with pytest.raises(ValueError, match=r"k: must be 1 ... 3 \(what the filter leaves\), got 4"):
        pipe("pizza", where=few, k=4, **quick)
    with pytest.raises(ValueError, match="groups, where: leave no image"):
        pipe("pizza", where=lambda item: False, **quick)
    with pytest.raises(ValueError, match="database: holds no image"):
        pipe("pizza", database=Database(pipe.encoder.card), **quick)


def test_without_k_a_mix_gives_as_many_as_its_parts_have():
    large, small = toy_database("large", np.eye(3)[[0] * 20]), toy_database("small", np.eye(3))
    both = Mixture({large: 1.0, small: 1.0})
    assert choose_neighbours(both, None, None, None)[0] == 7  # 4 and 3
    k, ids = choose_neighbours(both, None, None, lambda item: item.name != "small0")
    assert (k, len(both.search(Toy().encode_text(["x"]), k, allow=ids)[0])) == (5, 5)
    with pytest.raises(ValueError, match="4 neighbours are asked of Database"):
        both.search(Toy().encode_text(["x"]), 8)
    with pytest.raises(ValueError, match="4 neighbours are asked of Database"):
        choose_neighbours(both, 8, None, None)
    with pytest.raises(ValueError, match="1 neighbours are asked of Database"):
        choose_neighbours(both, None, ["small"], None)


def test_call_mixes_databases(pipe, tmp_path):
    pipe.databases["animals"].save(tmp_path / "animals")
    both = {"stickers": 0.5, tmp_path / "animals": 0.5}
    out = pipe("a cat", database=both, k=6, steps=1, seed=0)
    animals = {item.name for item in pipe.databases["animals"]}
    assert sum(name in animals for name in names(out)) == 3
    pipe.database = both
    try:
        assert names(pipe("a cat", k=6, steps=1, seed=0)) == names(out)
        assert isinstance(pipe.database, Mixture)
        with pytest.raises(TypeError, match="database: a mix is of databases, got Mixture"):
            pipe.find_database({pipe.database: 1.0})
    finally:
        pipe.database = "stickers"
    with pytest.raises(ValueError, match="nowhere"):
        pipe("a cat", database={"nowhere": 1.0})


def test_a_query_object_is_not_changed(pipe):
    query = mix(("pizza", 1.0))
    pipe(query, steps=1, seed=0)
    assert query.parts == (("pizza", 1.0),)
    assert isinstance(query, Query)
