"""Collections as training data: folders, shards, databases; encoded once, in parts."""

import io
import tarfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_training import Colours, tokenizer

from knnfast.database import Database
from knnfast.diffusion import data
from knnfast.diffusion.augment import STICKERS
from knnfast.diffusion.data import (
    build_database,
    count_readable,
    encode,
    identity,
    load_images,
    own_crop,
    pictures,
    shards,
)
from knnfast.diffusion.distributed import Processes
from knnfast.diffusion.tokenizer import VQTokenizer
from knnfast.encoders import Embeddings, load_encoder, pixels
from knnfast.pipeline import BUNDLES


def image(number: int) -> Image.Image:
    rng = np.random.default_rng(number)
    return Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "pictures"
    (root / "deep").mkdir(parents=True)
    for i in range(10):
        image(i).save((root / "deep" if i % 2 else root) / f"{i:02d}.png")
    return root


def write_shard(path: Path, numbers: range) -> None:
    with tarfile.open(path, "w") as tar:
        for i in numbers:
            png = io.BytesIO()
            image(i).save(png, "PNG")
            for name, content in (
                (f"{i:02d}.txt", b"a caption that nobody reads"), (f"{i:02d}.png", png.getvalue()),
            ):  # fmt: skip
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    root = tmp_path / "shards"
    root.mkdir()
    write_shard(root / "set-000.tar", range(6))
    write_shard(root / "set-001.tar", range(6, 10))
    return root


def numbers_of(collection) -> list[int]:
    known = {image(i).tobytes(): i for i in range(10)}
    return [known[item.read().tobytes()] for item in pictures(collection)]


def test_folders_and_shards_give_the_same_pictures(folder: Path, tars: Path) -> None:
    assert sorted(numbers_of(folder)) == list(range(10))
    pattern = str(tars / "set-{000..001}.tar")
    for collection in (tars, pattern):
        assert numbers_of(collection) == list(range(10))
    assert numbers_of(tars / "set-001.tar") == [6, 7, 8, 9]
    assert [p.name for p in shards(pattern)] == ["set-000.tar", "set-001.tar"]
    assert shards(folder) == []
    with pytest.raises(FileNotFoundError, match=r"set-002\.tar: no such shard"):
        shards(str(tars / "set-{000..002}.tar"))
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        list(pictures("nowhere"))


def test_a_database_gives_its_pictures() -> None:
    db = Database(Colours.card, 8)
    images = [image(i) for i in range(4)]
    rows = np.asarray(Colours().encode_images(images).vectors, np.float32)
    db.add(Embeddings(rows, Colours.card), images, names=list("abcd"))
    assert numbers_of(db) == [0, 1, 2, 3]
    assert identity(db) == identity(db)
    db.add(Embeddings(rows[:1], Colours.card), [image(4)], names=["e"], sources=["lost/e.png"])
    with pytest.warns(UserWarning, match="1 of 5 pictures come from the database's thumbnails"):
        assert numbers_of(db) == [0, 1, 2, 3, 4]


def test_a_database_is_read_from_its_pictures(folder: Path, tmp_path: Path, monkeypatch) -> None:
    """As `knnfast database build pictures --out db; knnfast train db` reads it."""
    Database.build(folder, ColoursWithCard(), thumbnail_size=8).save(tmp_path / "db")
    monkeypatch.chdir("/")
    assert sorted(numbers_of(Database.open(tmp_path / "db"))) == list(range(10))


@pytest.mark.filterwarnings("ignore:10 of 10 pictures come from the database's thumbnails")
def test_what_was_made_of_thumbnails_is_not_taken_for_that_of_pictures(folder, tmp_path) -> None:
    db = Database.build(folder, ColoursWithCard(), thumbnail_size=4)
    folder.rename(tmp_path / "moved")
    encoded(db, tmp_path / "out")
    db.pictures = tmp_path / "moved"
    with pytest.raises(ValueError, match=r"made with thumbnails = 10, now it is 0"):
        encoded(db, tmp_path / "out")
    made = encoded(db, tmp_path / "other")
    db.pictures = folder  # what was made of the pictures is good where they are not
    again = encoded(db, tmp_path / "other")
    assert torch.equal(again.codes, made.codes)


class ColoursWithCard(Colours):
    def encode_images(self, images, batch_size=64):
        rows = np.asarray(super().encode_images(images).vectors, np.float32)
        return Embeddings(rows, self.card)


def test_shards_become_a_database(tars: Path) -> None:
    db = build_database(tars, ColoursWithCard(), batch=4)
    assert [item.name for item in db] == [f"{i:02d}" for i in range(10)]
    assert db[7].source == "set-001.tar/07.png"


def test_members_keep_their_names_and_folders(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a: b.tar", "w") as tar:
        for name in ("./000001.jpg", "v1.2/0002.seg.jpg", "v1.2/.jpg.jpg", "caf\udce9.jpg"):
            jpg = io.BytesIO()
            image(1).save(jpg, "JPEG")
            member = tarfile.TarInfo(name)
            member.size = len(jpg.getvalue())
            tar.addfile(member, io.BytesIO(jpg.getvalue()))
    db = build_database(tmp_path, ColoursWithCard())
    assert [(item.name, item.group, item.source) for item in db] == [
        ("000001", ".", "a: b.tar/000001.jpg"),
        ("0002", "v1.2", "a: b.tar/v1.2/0002.seg.jpg"),
        (".jpg.jpg", "v1.2", "a: b.tar/v1.2/.jpg.jpg"),
        ("caf\N{REPLACEMENT CHARACTER}", ".", "a: b.tar/caf\udce9.jpg"),
    ]
    db.save(tmp_path / "db")
    assert list(Database.open(tmp_path / "db")) == list(db)
    assert identity(Database.open(tmp_path / "db")) == identity(db)


def test_a_damaged_shard_is_told(tars: Path) -> None:
    file = tars / "set-001.tar"
    file.write_bytes(file.read_bytes()[:1700])
    with pytest.raises(ValueError, match=r"set-001\.tar: a damaged shard"):
        numbers_of(tars)


def test_unreadable_pictures_are_told(folder: Path) -> None:
    (folder / "bad.png").write_bytes(b"no picture")
    images, embeddings, skipped = load_images(pictures(folder), 4, Colours(), "pad", batch=3)
    assert images.shape == (10, 3, 4, 4)
    assert embeddings.shape == (10, 12)
    assert len(skipped) == 1
    assert skipped == [f"{folder / 'bad.png'}: not a readable image"]
    none = load_images([], 4, Colours(), "pad")
    assert (none.squares.shape, none.embeddings.shape) == ((0, 3, 4, 4), (0, 12))


def test_a_wide_picture_is_padded_and_embedded_whole(tmp_path: Path) -> None:
    """2:1, twice the tokenizer's size: its codes are the padded square's, its embedding is the
    database's, whatever the tokenizer's size."""
    wide = tmp_path / "wide"
    wide.mkdir()
    rng = np.random.default_rng(0)
    for i in range(2):
        Image.fromarray(rng.integers(0, 255, (8, 16, 3), dtype=np.uint8)).save(wide / f"{i}.png")
    encoder = load_encoder(BUNDLES / "stickers" / "encoder")
    made = encode(wide, tmp_path / "out", encoder, tokenizer(), 2, 0, progress=False)
    originals = [p.read() for p in pictures(wide)]
    square = torch.from_numpy(pixels(originals, 8)).permute(0, 3, 1, 2)
    assert (square[:, :, :2] == 255).all()
    assert (square[:, :, 6:] == 255).all()
    assert torch.equal(made.codes[0].long(), tokenizer().encode(square.float() / 255))
    db = Database.build(wide, encoder)
    np.testing.assert_allclose(made.embeddings[0], db.vectors(db.ids), atol=1e-3)


def test_crops(tmp_path: Path) -> None:
    """Codes and embedding are of one part of a picture, and of the part that a database embeds."""

    class Middle(Colours):
        card = replace(Colours.card, name="open_clip:middle/x")

    wide = tmp_path / "wide"
    wide.mkdir()
    rng = np.random.default_rng(0)
    for i in range(2):
        Image.fromarray(rng.integers(0, 255, (8, 16, 3), dtype=np.uint8)).save(wide / f"{i}.png")
    originals = [p.read() for p in pictures(wide)]
    assert [own_crop(e()) for e in (Colours, Middle)] == ["pad", "center"]
    middle = [x.crop((4, 0, 12, 8)) for x in originals]
    padded = [Image.fromarray(x) for x in pixels(originals, 16)]
    for encoder, crop, coded, embedded in (
        (Middle(), None, middle, originals),
        (Middle(), "pad", originals, padded),
        (Colours(), "center", middle, middle),
        (Colours(), None, originals, originals),
    ):
        out = tmp_path / f"{crop}{encoder.card.name[:9]}"
        made = encode(wide, out, encoder, tokenizer(), 1, 0, progress=False, crop=crop)
        seen = torch.from_numpy(pixels(coded, 8)).permute(0, 3, 1, 2)  # which pads
        wanted = tokenizer().encode(seen.float() / 255)
        assert torch.equal(made.codes[0].long(), wanted)
        rows = encoder.encode_images(embedded).vectors
        np.testing.assert_allclose(made.embeddings[0], rows, atol=1e-3)
    with pytest.raises(ValueError, match="crop must be one of center, pad, got 'left'"):
        encode(wide, tmp_path / "x", Colours(), tokenizer(), 1, 0, progress=False, crop="left")


def test_a_square_picture_is_shrunk_as_it_is() -> None:
    """Squares, such as the stickers, get no padding: the plain resize, and none at their size."""
    square = Image.fromarray(np.random.default_rng(0).integers(0, 255, (72, 72, 3), dtype=np.uint8))
    item = data.Picture("square", lambda: square)
    for size in (64, 72):
        plain = square.resize((size, size), Image.Resampling.LANCZOS)
        squares = load_images([item], size, Colours(), "center").squares
        np.testing.assert_array_equal(squares[0].permute(1, 2, 0), np.array(plain))


def test_more_codes_than_pairs_hold(monkeypatch) -> None:
    monkeypatch.setattr(VQTokenizer, "codebook_size", 32769)
    with pytest.raises(ValueError, match="pairs hold at most 32,768 codes, got 32,769"):
        data.make_pairs([torch.zeros(1, 3, 8, 8, dtype=torch.uint8)], Colours(), tokenizer())


def encoded(collection, out: Path, versions: int = 2, seed: int = 0, size=None, **options):
    codes = tokenizer()
    codes.config = replace(codes.config, sample_size=size or codes.image_size)
    return encode(collection, out, Colours(), codes, versions, seed, progress=False, **options)


def test_encoding_in_parts(folder: Path, tmp_path: Path, monkeypatch) -> None:
    """Shared among processes, killed and gone on: the same file; made once; refused if changed."""
    monkeypatch.setattr(data, "PART", 3)
    whole = encoded(folder, tmp_path / "whole")
    assert whole.codes.shape == (2, 10, 16)
    direct = Colours().encode_images([p.read() for p in pictures(folder)]).vectors
    np.testing.assert_allclose(whole.embeddings[0], direct, atol=1e-3)
    assert torch.equal(whole.targets, torch.arange(10))

    out = tmp_path / "shared"
    made = data.make_pairs
    calls = []

    def dies(*args, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return made(*args, **options)

    monkeypatch.setattr(data, "make_pairs", dies)
    with pytest.raises(KeyboardInterrupt):
        encoded(folder, out)
    parts = out / "pairs.parts"
    assert len(list(parts.glob("0*.safetensors"))) == 2
    for change, message in (
        ({"versions": 3}, "versions = 2, now it is 3"),
        ({"crop": "center"}, "crop = 'pad', now it is 'center'"),
        ({"augmentation": STICKERS}, "augmentation = "),
        ({"size": 32}, "image_size = "),
    ):
        with pytest.raises(ValueError, match=rf"recipe\.json: was made with {message}"):
            encoded(folder, out, **change)
    # Two processes: each does its own parts (0 and 2, 1 and 3) of those still missing.
    monkeypatch.setattr(data, "make_pairs", made)
    (parts / "000001.safetensors").unlink()
    share = (folder, parts, Colours(), tokenizer(), "pad", partial(data.versions_of, count=2), 0)
    data._encode_parts(*share, Processes(1, 2), False)
    assert sorted(p.name[:6] for p in parts.glob("0*")) == ["000000", "000001", "000003"]
    again = encoded(folder, out)
    for name in ("codes", "embeddings"):
        assert torch.equal(getattr(again, name), getattr(whole, name))
    assert not parts.exists()

    file = out / "pairs.safetensors"
    before = file.stat().st_mtime_ns
    encoded(folder, out)
    assert file.stat().st_mtime_ns == before
    image(11).save(folder / "new.png")
    with pytest.raises(ValueError, match=r"pairs\.json: was made with data = "):
        encoded(folder, out)
    (folder / "new.png").unlink()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"pairs\.safetensors: damaged"):
        encoded(folder, out)
    assert set(load_file(tmp_path / "whole" / "pairs.safetensors")) == set(vars(whole))


def test_seeds(folder: Path, tmp_path: Path) -> None:
    """Every seed of 64 bits is one of its own, in every part and version."""
    seeds = (0, 20261130, 2**64 - 1)
    made = [encoded(folder, tmp_path / str(seed), versions=3, seed=seed) for seed in seeds]
    versions = [pairs.embeddings[version] for pairs in made for version in (1, 2)]
    for i, one in enumerate(versions):
        assert not any(torch.equal(one, other) for other in versions[:i])


@pytest.mark.filterwarnings("ignore:skipped")
def test_too_few(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    image(0).save(tmp_path / "one" / "0.png")
    (tmp_path / "one" / "1.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="at least two readable images, found 1"):
        encoded(tmp_path / "one", tmp_path / "out")
    assert count_readable(tmp_path / "one", 5) == 1
