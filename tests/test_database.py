"""Database: built from a folder of real image files, searched, saved, damaged, merged."""

import json
import multiprocessing
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from knnfast import _files
from knnfast.database import Database
from knnfast.encoders import Embeddings, EncoderCard
from knnfast.images import flatten, read_image
from knnfast.search import Index


class ColourEncoder:
    """A stand-in whose embedding is the image's mean colour: neighbours can be told by eye."""

    card = EncoderCard(name="colour", dim=4, sha256="c0" * 32, image_size=8)
    dim = 4

    def encode_images(self, images, batch_size=64):
        rows = [[*np.asarray(i, np.float32).reshape(-1, 3).mean(0), 32.0] for i in images]
        x = np.asarray(rows, np.float32)
        return Embeddings(x / np.linalg.norm(x, axis=1, keepdims=True), self.card)


COLOURS = {
    "warm/red.png": "red",
    "warm/orange.jpg": "orange",
    "cold/blue.webp": "blue",
    "cold/deep/navy.png": "navy",
}


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "images"
    for name, colour in COLOURS.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.new("RGB", (40, 20), "white")
        ImageDraw.Draw(image).rectangle((5, 0, 35, 20), fill=colour)
        image.save(path)
    return root


@pytest.fixture
def built(folder):
    return Database.build(folder, ColourEncoder())


def query(colour):
    return ColourEncoder().encode_images([Image.new("RGB", (8, 8), colour)])


def test_sixteen_bits_of_grey_are_scaled(tmp_path):
    grey = np.linspace(0, 65535, 4096).reshape(64, 64).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    pixels = np.asarray(read_image(tmp_path / "grey.png"))
    np.testing.assert_array_equal(pixels, np.repeat((grey / 257).round()[..., None], 3, 2))


def test_grey_beyond_eight_bits(tmp_path):
    """One level may be transparent; without a fixed range nobody knows what is white."""
    grey = np.full((8, 8), 40_000, np.uint16)
    grey[:4] = 0
    Image.fromarray(grey).save(tmp_path / "clear.png", transparency=0)
    seen = np.asarray(read_image(tmp_path / "clear.png"))
    assert seen[0, 0].tolist() == [255] * 3
    assert seen[-1, 0].tolist() == [round(40_000 / 257)] * 3
    assert np.asarray(flatten(Image.fromarray(grey.astype(np.int32))))[-1, 0, 0] == seen[-1, 0, 0]
    with pytest.raises(ValueError, match=r"image: mode I must hold 0 to 65535, got -1 to 5"):
        flatten(Image.fromarray(np.array([[-1, 5]], np.int32)))
    with pytest.raises(ValueError, match="image: mode F has no fixed range"):
        flatten(Image.fromarray(np.zeros((2, 2), np.float32)))


def test_a_database_is_read_wherever_the_process_goes(built, tmp_path, monkeypatch):
    built.save(tmp_path / "db")
    monkeypatch.chdir(tmp_path)
    moved, still = Database.open("db"), Database.open("db")
    monkeypatch.chdir("/")
    np.testing.assert_array_equal(still.thumbnail(0), Database.open(tmp_path / "db").thumbnail(0))
    still.save(tmp_path / "again")
    (tmp_path / "db").rename(tmp_path / "else")
    for lost in (lambda: moved.thumbnail(0), lambda: moved.save(tmp_path / "more")):
        with pytest.raises(FileNotFoundError, match="gone; its database was moved or saved anew"):
            lost()
    assert not (tmp_path / "more").exists()


def test_build_names_groups_and_sources(built):
    assert sorted((x.name, x.group, x.source) for x in built) == [
        ("blue", "cold", "cold/blue.webp"),
        ("navy", "cold/deep", "cold/deep/navy.png"),
        ("orange", "warm", "warm/orange.jpg"),
        ("red", "warm", "warm/red.png"),
    ]
    assert built.groups == {"cold": 1, "cold/deep": 1, "warm": 2}


def test_add_folder_takes_in_what_is_new(folder, built, tmp_path, monkeypatch):
    """By a file's place: whichever path leads to it, and at any depth of the folder."""
    encoder, before = ColourEncoder(), {item.source for item in built}
    assert len(built.add_folder(folder, encoder)) == 0
    Image.new("RGB", (8, 8), "green").save(folder / "cold" / "deep" / "green.png")
    monkeypatch.chdir(folder / "cold")
    skipped = []
    (folder / "cold" / "deep" / "broken.png").write_bytes(b"no image")
    added = built.add_folder("deep", encoder, on_skip=lambda path, reason: skipped.append(path))
    (green,) = (built[i] for i in added.tolist())
    assert (green.name, green.group, green.source) == ("green", "cold/deep", "cold/deep/green.png")
    assert skipped == [Path("deep/broken.png")]
    outside = tmp_path / "outside" / "bright"
    outside.mkdir(parents=True)
    Image.new("RGB", (8, 8), "yellow").save(outside / "yellow.png")
    for times in (1, 0):  # the second time it is there
        added = built.add_folder(outside.parent, encoder, batch_size=2)
        assert len(added) == times
        if times:
            yellow = built[int(added[0])]
            assert (yellow.name, yellow.group) == ("yellow", "bright")
            assert built.file(yellow) == outside / "yellow.png"
    built.save(tmp_path / "db")
    opened = Database.open(tmp_path / "db")
    assert len(opened.add_folder(folder, encoder)) == 0
    assert {item.source for item in opened} > before
    assert len(opened) == len(built) == 6
    (found,) = opened.search(query("yellow"), 1)
    assert found[0].item.name == "yellow"


def test_add_folder_of_a_parent_and_by_two_threads(folder, built):
    """What lies below `pictures` is inside, whichever folder is asked for; each is added once."""
    Image.new("RGB", (8, 8), "green").save(folder / "cold" / "green.png")
    Image.new("RGB", (8, 8), "pink").save(folder.parent / "pink.png")
    with ThreadPoolExecutor(4) as threads:
        adding = [
            threads.submit(built.add_folder, folder.parent, ColourEncoder()) for _ in range(4)
        ]
        assert sorted(len(each.result()) for each in adding) == [0, 0, 0, 2]
    new = {item.name: (item.group, item.source) for item in list(built)[4:]}
    assert new["green"] == ("cold", "cold/green.png")
    assert new["pink"] == (".", str(folder.parent / "pink.png"))


def test_what_cannot_be_listed_or_entered_is_told(folder, monkeypatch):
    real = os.scandir

    def scandir(path):
        if Path(path).name == "deep":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.warns(UserWarning, match=r"skipped .*deep: Permission denied"):
        assert len(Database.build(folder, ColourEncoder())) == 3
    monkeypatch.undo()

    def is_file(path):
        if path.name == "red.png":
            raise PermissionError(13, "Permission denied", str(path))
        return path.exists()

    monkeypatch.setattr(Path, "is_file", is_file)
    skipped = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("knnfast.database.read_image", lambda path: is_file(path) and flat(path))
        db = Database.build(folder, ColourEncoder(), on_skip=lambda path, _: skipped.append(path))
    assert (len(db), [path.name for path in skipped]) == (3, ["red.png"])


def flat(path):
    with Image.open(path) as image:
        return image.convert("RGB")


def test_a_database_that_others_saved_is_not_written_over(built, tmp_path):
    """Two that opened the same one: the second to save would undo what the first one added."""
    built.save(tmp_path / "db")
    one, other = Database.open(tmp_path / "db"), Database.open(tmp_path / "db")
    pink = Image.new("RGB", (8, 8), "pink")
    for db in (one, other):
        [db.thumbnail(i) for i in db.ids.tolist()]
        db.add(query("pink"), [pink], names=["pink"])
    for _ in range(2):
        one.save(tmp_path / "db")
    with pytest.raises(ValueError, match="others have saved this database since it was opened"):
        other.save(tmp_path / "db")
    assert len(Database.open(tmp_path / "db")) == 5
    other.save(tmp_path / "elsewhere")
    again = Database.open(tmp_path / "db")
    built.save(tmp_path / "db")  # built anew, not opened there: it is meant to replace it
    with pytest.raises(ValueError, match="open it again"):
        again.save(tmp_path / "db")


def test_add_folder_refuses(folder, built):
    other = ColourEncoder()
    other.card = EncoderCard(name="other", dim=4, sha256="0" * 64, image_size=8)
    with pytest.raises(ValueError, match="embeddings of encoder 'other'"):
        built.add_folder(folder, other)
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        built.add_folder("nowhere", ColourEncoder())
    with pytest.raises(TypeError, match="batch_size: expected a whole number, got '8'"):
        built.add_folder(folder, ColourEncoder(), batch_size="8")
    with pytest.raises(TypeError, match="thumbnail_size: expected a whole number, got '64'"):
        Database(ColourEncoder.card, thumbnail_size="64")
    for size in (0, 257):
        with pytest.raises(ValueError, match=rf"thumbnail_size: must be 1 ... 256, got {size}"):
            Database(ColourEncoder.card, thumbnail_size=size)
    assert len(built) == 4


def test_batch_size_reaches_the_encoder(folder):
    class Counts(ColourEncoder):
        def encode_images(self, images, batch_size=64):
            seen.append((len(images), batch_size))
            return super().encode_images(images)

    seen = []
    Database.build(folder, Counts(), batch_size=3)
    assert seen == [(3, 3), (1, 3)]


def test_vectors_are_of_ids_alone(built):
    for ids, kind in (([True, False], "bool"), ([1.7], "float64")):
        with pytest.raises(TypeError, match=f"ids must hold integers, got {kind}"):
            built.vectors(ids)
    assert built.vectors([]).shape == (0, 4)


def test_search_finds_the_nearest_colour(built):
    (found,) = built.search(query("darkred"), 2)
    assert [n.item.name for n in found] == ["red", "orange"]
    assert found[0].score > found[1].score


def test_search_within_groups(built):
    (found,) = built.search(query("darkred"), 4, allow=built.ids_of(["cold", "cold/deep"]))
    assert {n.item.group for n in found} == {"cold", "cold/deep"}
    with pytest.raises(ValueError, match="hot"):
        built.ids_of(["hot"])


def test_damaged_files_are_reported_and_skipped(folder):
    (folder / "warm" / "text.png").write_text("this is no image")
    whole = (folder / "warm" / "red.png").read_bytes()
    (folder / "warm" / "cut.png").write_bytes(whole[: len(whole) // 2])
    skipped = []
    db = Database.build(
        folder, ColourEncoder(), on_skip=lambda path, why: skipped.append(path.name)
    )
    assert sorted(skipped) == ["cut.png", "text.png"]
    assert len(db) == len(COLOURS)


def test_a_folder_without_images_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no readable image"):
        Database.build(tmp_path, ColourEncoder())
    with pytest.raises(FileNotFoundError, match="no such folder"):
        Database.build(tmp_path / "absent", ColourEncoder())


def test_another_encoders_embeddings_are_refused(built):
    other = EncoderCard(name="other", dim=4, sha256="00" * 32, image_size=8)
    with pytest.raises(ValueError, match=r"'other'.*'colour'"):
        built.search(Embeddings(query("red").vectors, other), 1)
    with pytest.raises(ValueError, match="'other'"):
        built.add(Embeddings(query("red").vectors, other), [Image.new("RGB", (4, 4))], names=["x"])
    assert len(built) == len(built.index) == len(COLOURS)


def test_saved_and_opened_is_the_same(built, tmp_path):
    built.save(tmp_path / "db")
    opened = Database.open(tmp_path / "db")
    assert list(opened) == list(built)
    assert opened.encoder == built.encoder
    np.testing.assert_array_equal(opened.vectors(opened.ids), built.vectors(built.ids))
    assert opened.search(query("navy"), 3) == built.search(query("navy"), 3)
    for i in built.ids.tolist():  # WebP is lossy; the middle of a flat colour survives
        a, b = (np.asarray(d.thumbnail(i), float)[28:36, 28:36] for d in (built, opened))
        assert np.abs(a - b).mean() < 12


def test_saving_again_replaces_and_leaves_nothing_behind(built, tmp_path):
    built.save(tmp_path / "db")
    before = {p.name for p in (tmp_path / "db").iterdir()}
    built.save(tmp_path / "db")
    after = {p.name for p in (tmp_path / "db").iterdir()}
    assert len(before) == len(after)
    assert before & after == {"database.json"}
    assert list(Database.open(tmp_path / "db")) == list(built)


def test_saving_goes_on_where_a_first_save_was_killed(built, tmp_path):
    root = tmp_path / "db"
    root.mkdir()
    (root / "items-0a1b2c3d.json").write_text("{}")
    (root / ".thumbnails-0a1b2c3d-0000.webp-0a1b2c3d").write_text("")
    built.save(root)
    assert len(Database.open(root)) == 4
    assert not (root / "items-0a1b2c3d.json").exists()


def test_threads_and_processes_that_save_to_one_folder_take_turns(built, tmp_path):
    root = tmp_path / "db"
    fork = multiprocessing.get_context("fork")

    def save(times=3):
        for _ in range(times):
            built.save(root)

    children = [fork.Process(target=save) for _ in range(2)]
    for child in children:
        child.start()
    with ThreadPoolExecutor(3) as threads:
        for done in [threads.submit(save) for _ in range(3)]:
            done.result()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0]
    opened = Database.open(root)
    assert {opened.thumbnail(i).size for i in opened.ids.tolist()} == {(64, 64)}
    assert len(list(root.iterdir())) == 4  # one generation


def test_who_waits_for_a_folder_that_is_removed_makes_it_anew(tmp_path):
    folder = tmp_path / "db"

    def enter():
        with _files.locked(folder):
            return folder.is_dir()

    with ThreadPoolExecutor(1) as threads:
        with _files.locked(folder):
            waits = threads.submit(enter)
            time.sleep(0.2)
            folder.rmdir()
        assert waits.result(timeout=60)


def test_a_first_save_that_ends_while_another_looks_at_the_folder_is_a_database(
    built, tmp_path, monkeypatch
):
    root = tmp_path / "db"
    root.mkdir()
    listing = Path.iterdir

    def late(path):
        monkeypatch.setattr(Path, "iterdir", listing)
        built.save(root)
        return path.iterdir()

    monkeypatch.setattr(Path, "iterdir", late)
    Database.check_place(root)
    assert Database.is_at(root)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"images": [Image.new("RGB", (9, 9)), "x"]}, TypeError),
        ({"images": [Image.new("RGB", (9, 9)), Image.new("RGB", (0, 9))]}, ValueError),
        ({"names": ["a", None]}, TypeError),
        ({"names": "ab"}, TypeError),
        ({"groups": [1, 2]}, TypeError),
    ],
)
def test_add_adds_nothing_when_one_entry_is_bad(built, change, error):
    call = {"images": [Image.new("RGB", (9, 9))] * 2, "names": ["a", "b"]} | change
    before = built.ids.tolist()
    with pytest.raises(error, match=next(iter(change)).removesuffix("s")):
        built.add(ColourEncoder().encode_images([Image.new("RGB", (8, 8))] * 2), **call)
    assert built.ids.tolist() == before
    assert len(built.index) == len(before)
    assert len(built.search(query("red"), 4)[0]) == 4


def test_saving_again_leaves_files_that_are_not_its_own(built, tmp_path):
    root = tmp_path / "db"
    built.save(root)
    whole = len(list(root.iterdir()))
    kept = [
        "notes.txt",
        "items.json",
        "items-2024.json",
        "thumbnails-all.webp",
        ".hidden",
        "index-a",
    ]
    for name in kept:
        (root / name).write_text("mine")
    (root / "pictures").mkdir()
    (root / "pictures" / "one.png").write_text("mine")
    dropped = [".database.json-1a2b3c4d", ".items-0a1b2c3d.json-x_yz1234", "items-0a1b2c3d.json"]
    for name in dropped:  # what kills left
        (root / name).write_text("")
    built.save(root)
    names = {p.name for p in root.iterdir()}
    assert names >= {*kept, "pictures"}
    assert not names & {*dropped}
    assert len(names) == whole + len(kept) + 1
    assert (root / "pictures" / "one.png").read_text() == "mine"
    assert list(Database.open(root)) == list(built)


def test_a_link_of_an_old_files_name_is_removed_alone(built, tmp_path):
    built.save(tmp_path / "db")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    link = tmp_path / "db" / "index-0a1b2c3d"
    link.symlink_to(tmp_path / "mine")
    built.save(tmp_path / "db")
    assert not link.is_symlink()
    assert (tmp_path / "mine" / "thesis.txt").is_file()


def test_saving_into_a_foreign_folder_is_refused(built, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="other content"):
        built.save(tmp_path / "mine")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    (tmp_path / "mine" / "thesis.txt").rename(tmp_path / "mine" / "database.json")
    with pytest.raises(ValueError, match="other content"):
        built.save(tmp_path / "mine")
    assert (tmp_path / "mine" / "database.json").read_text() == "years of work"


@pytest.mark.parametrize("part", ["items", "thumbnails", "database"])
def test_damaged_database_files_are_named(built, tmp_path, part):
    built.save(tmp_path / "db")
    (path,) = (tmp_path / "db").glob(f"{part}*.*")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(ValueError, match=path.name):
        Database.open(tmp_path / "db").thumbnail(0)


def rewrite(root, part, change):
    """Change a JSON file of a database, as one who can record its hash does."""
    (path,) = root.glob(f"{part}*.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    if part != "database":
        manifest = json.loads((root / "database.json").read_text())
        sha256 = manifest["sha256"] | {path.name: _files.sha256_file(path)}
        rewrite(root, "database", {"sha256": sha256})


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("database", {"items": "../elsewhere.json"}, "plain file name"),
        ("database", {"thumbnail_size": 0}, "thumbnail_size: must be 1 ... 256, got 0"),
        ("database", {"thumbnail_size": 10**9}, "thumbnail_size: must be 1 ... 256"),
        ("database", {"encoder": {"dim": "x"}}, "not an encoder card"),
        ("items", {"ids": [0, 1, 2, "x"]}, "invalid literal"),
        ("items", {"ids": [0, 1, 2, 1e999]}, "cannot convert float infinity"),
        ("items", {"names": ["red"]}, "argument 2 is shorter"),
        ("items", {name: [] for name in ("ids", "names", "groups", "sources")}, "1 thumbnail atl"),
        ("database", {"thumbnails": []}, "0 thumbnail atlases for 4 images"),
    ],
)
def test_malformed_files_are_named(built, tmp_path, part, change, message):
    built.save(tmp_path / "db")
    rewrite(tmp_path / "db", part, change)
    with pytest.raises(ValueError, match=rf"\.json: incomplete or malformed .*{message}"):
        Database.open(tmp_path / "db")


def test_an_index_of_other_ids_is_refused(built, tmp_path):
    built.save(tmp_path / "db")
    rewrite(tmp_path / "db", "items", {"ids": [0, 1, 2, 4]})
    with pytest.raises(ValueError, match=r"database\.json: the index holds 4 rows.* or other ids"):
        Database.open(tmp_path / "db")


def test_file_names_that_are_no_utf8(folder, tmp_path):
    (folder / "warm" / "red.png").rename(folder / "warm" / "caf\udce9.png")
    db = Database.build(folder, ColourEncoder())
    db.save(tmp_path / "db")
    again = Database.open(tmp_path / "db")
    (item,) = (item for item in again if item.name.startswith("caf"))
    assert item.name == "caf\N{REPLACEMENT CHARACTER}"
    assert (folder / item.source).is_file()
    (tmp_path / "db" / "database.json").read_text(encoding="utf-8")


def test_a_save_beside_adds_is_whole(built, tmp_path):
    stop = threading.Event()

    def add():
        while not stop.is_set():
            built.add(query("pink"), [Image.new("RGB", (8, 8), "pink")], names=["pink"])

    with ThreadPoolExecutor(1) as threads:
        adding = threads.submit(add)
        try:
            for _ in range(5):
                built.save(tmp_path / "db")
                Database.open(tmp_path / "db")
        finally:
            stop.set()
        adding.result()


def test_names_steer_no_terminal(folder):
    (folder / "warm" / "red.png").rename(folder / "warm" / "\x1b[31mred\n.png")
    names = {item.name for item in Database.build(folder, ColourEncoder())}
    assert "\ufffd[31mred\ufffd" in names


def test_a_database_within_its_pictures_is_none_of_them(folder):
    for _ in range(2):
        db = Database.build(folder, ColourEncoder())
        assert len(db) == 4
        db.save(folder / "db")


def test_a_save_that_is_interrupted_behind_its_last_step_is_done(built, tmp_path, monkeypatch):
    from knnfast import _files

    real = _files.write_json

    def write_json(path, value):
        real(path, value)
        raise KeyboardInterrupt

    monkeypatch.setattr(_files, "write_json", write_json)
    with pytest.raises(KeyboardInterrupt):
        built.save(tmp_path / "db")
    assert list(Database.open(tmp_path / "db")) == list(built)


def test_a_search_sees_rows_with_their_items(built):
    added, searched = threading.Event(), threading.Event()
    index = built.index

    class Slow:
        def __getattr__(self, name):
            return getattr(index, name)

        def __len__(self):
            return len(index)

        def add(self, rows):
            ids = index.add(rows)
            added.set()
            searched.wait(0.3)  # the searching thread has found the new row by then
            return ids

    built.index = Slow()
    pink = Image.new("RGB", (8, 8), "pink")
    with ThreadPoolExecutor(1) as threads:
        adding = threads.submit(built.add, query("pink"), [pink], names=["pink"])
        added.wait()
        (found,) = built.search(query("pink"), 1)
        searched.set()
        adding.result()
    assert found[0].item.name == "pink"


def test_an_interrupted_add_adds_nothing(built, monkeypatch):
    def put(id, thumbnail):
        raise KeyboardInterrupt

    monkeypatch.setattr(built._thumbnails, "put", put)
    with pytest.raises(KeyboardInterrupt):
        built.add(query("pink"), [Image.new("RGB", (8, 8), "pink")], names=["pink"])
    assert len(built) == len(built.index) == 4
    (found,) = built.search(query("pink"), 5)
    assert len(found) == 4


def test_who_opens_a_database_that_is_saved_meanwhile_gets_one(built, tmp_path, monkeypatch):
    from knnfast import _files

    built.save(tmp_path / "db")
    real, saves = _files.check_sha256, iter([True])

    def check_sha256(path, sha256):
        if next(saves, False):
            built.save(tmp_path / "db")  # removes what the manifest names that has been read
        real(path, sha256)

    monkeypatch.setattr(_files, "check_sha256", check_sha256)
    assert list(Database.open(tmp_path / "db")) == list(built)
    (tmp_path / "db" / "database.json").unlink()
    with pytest.raises(FileNotFoundError, match="no database there"):
        Database.open(tmp_path / "db")


def sheets(root):
    return [path.read_bytes() for path in sorted(root.glob("thumbnails-*"))]


def looks(db, ids):
    return np.stack([np.asarray(db.thumbnail(i)) for i in ids])


def noise(count, seed):
    rng = np.random.default_rng(seed)
    return [Image.fromarray(x) for x in rng.integers(0, 256, (count, 16, 16, 3), np.uint8)]


def of_noise(count, seed):
    images = noise(count, seed)
    db = Database(ColourEncoder.card, thumbnail_size=16)
    db.add(ColourEncoder().encode_images(images), images, names=["noise"] * count)
    return db


@pytest.fixture
def small_atlases(monkeypatch):
    monkeypatch.setattr("knnfast.images.ATLAS_SIDE", 2)


def test_thumbnails_keep_their_bytes_however_often_they_are_saved(small_atlases, tmp_path):
    of_noise(7, 0).save(tmp_path / "db")
    first = sheets(tmp_path / "db")
    db = Database.open(tmp_path / "db")
    for root in (tmp_path / "db", tmp_path / "copy"):
        db.save(root)
        assert sheets(root) == first
    assert (looks(db, db.ids) == looks(Database.open(tmp_path / "copy"), db.ids)).all()


def test_thumbnails_that_are_packed_anew_lose_nothing(small_atlases, tmp_path):
    of_noise(7, 0).save(tmp_path / "a")
    of_noise(6, 1).save(tmp_path / "b")
    a, b = Database.open(tmp_path / "a"), Database.open(tmp_path / "b")
    before = np.concatenate([looks(a, a.ids), looks(b, b.ids)])
    merged = Database.merge([a, b])
    merged.save(tmp_path / "a")  # in the place of one of its sources
    assert sheets(tmp_path / "a")[0] != sheets(tmp_path / "b")[0]
    for db in (merged, Database.open(tmp_path / "a")):
        assert (looks(db, db.ids) == before).all()
    more = noise(2, 2)
    merged.add(ColourEncoder().encode_images(more), more, names=["x", "y"])
    assert merged.remove([0, 5]) == 2
    merged.save(tmp_path / "a")
    again = Database.open(tmp_path / "a")
    kept = np.delete(before, [0, 5], axis=0)
    assert (looks(again, again.ids[: len(kept)]) == kept).all()
    assert (looks(again, again.ids) == looks(merged, merged.ids)).all()


def test_a_damaged_atlas_is_not_copied(small_atlases, tmp_path):
    of_noise(5, 0).save(tmp_path / "db")
    db = Database.open(tmp_path / "db")
    (first, _) = sorted((tmp_path / "db").glob("thumbnails-*"))
    first.write_bytes(first.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=first.name):
        db.save(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_atlases_of_thumbnails_do_not_pile_up_in_memory(small_atlases, tmp_path):
    of_noise(80, 0).save(tmp_path / "db")
    db = Database.open(tmp_path / "db")
    looks(db, db.ids)
    assert not db._thumbnails._images
    assert db._thumbnails._sheet.cache_info().currsize == 8


def test_thumbnails_are_read_while_they_are_saved_in_their_place(tmp_path, monkeypatch):
    from knnfast import _files

    of_noise(3, 0).save(tmp_path / "db")
    before = looks(Database.open(tmp_path / "db"), range(3))
    db = Database.open(tmp_path / "db")
    real, saves = _files.check_sha256, iter([True])

    def check_sha256(path, sha256):
        if next(saves, False):
            db.save(tmp_path / "db")  # removes the atlas that is about to be read
        real(path, sha256)

    monkeypatch.setattr(_files, "check_sha256", check_sha256)
    assert (looks(db, range(3)) == before).all()


def test_a_remove_that_stops_half_way_is_none(built, monkeypatch):
    red, *_ = before = built.ids.tolist()
    remove = Index.remove
    for done in (False, True):  # stopped before the rows' removal and behind it

        def stop(self, ids, done=done):
            if done:
                remove(self, ids)
            raise KeyboardInterrupt

        monkeypatch.setattr(Index, "remove", stop)
        with pytest.raises(KeyboardInterrupt):
            built.remove([red])
        assert built.ids.tolist() == (before[1:] if done else before)
        assert len(built.index) == len(built)


def test_a_search_beside_a_remove_finds_as_many(built, monkeypatch):
    search, remove, found = Index.search, Index.remove, []
    there, rows_found = built.ids.tolist(), threading.Event()
    beside = threading.Thread(target=lambda: found.extend(built.search(query("navy"), len(there))))

    def tells(self, *args, **options):
        rows = search(self, *args, **options)
        rows_found.set()
        return rows

    def removes_then(self, ids):
        beside.start()
        assert rows_found.wait(10)
        return remove(self, ids)

    monkeypatch.setattr(Index, "search", tells)
    monkeypatch.setattr(Index, "remove", removes_then)
    built.remove(there[:1])
    beside.join(10)
    assert sorted(n.item.id for n in found[0]) == there


def test_remove(built, tmp_path):
    red = next(item.id for item in built if item.name == "red")
    assert built.remove([red, 99]) == 1
    assert len(built) == len(built.index) == 3
    (found,) = built.search(query("darkred"), 4)
    assert found[0].item.name == "orange"
    with pytest.raises(KeyError, match=f"id {red} is not in this database"):
        built.thumbnail(red)
    built.save(tmp_path / "db")
    assert list(Database.open(tmp_path / "db")) == list(built)
    with pytest.raises(TypeError, match="ids"):
        built.remove([0.5])
    assert len(built) == 3


def test_a_search_gives_what_is_removed_meanwhile(built, monkeypatch):
    search = built.index.search

    def then_remove(*args, **options):
        found = search(*args, **options)
        built.remove([0, 1])
        return found

    monkeypatch.setattr(built.index, "search", then_remove)
    (found,) = built.search(query("darkred"), 3)
    assert len(found) == 3
    assert len(built) == 2


def test_rows_without_their_items_are_not_saved(built, tmp_path):
    built.save(tmp_path / "db")
    before = list(built)
    built.index.remove([0])
    with pytest.raises(ValueError, match="index holds 3 rows for 4 images"):
        built.save(tmp_path / "db")
    assert list(Database.open(tmp_path / "db")) == before


def test_pictures_are_found_from_everywhere(built, folder, tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    built.save(tmp_path / "db")
    opened = Database.open(tmp_path / "db")
    assert opened.pictures == folder.resolve()
    assert {opened.file(item) for item in opened} == {folder.resolve() / name for name in COLOURS}
    folder.rename(tmp_path / "moved")
    assert {opened.file(item) for item in opened} == {None}
    opened.pictures = tmp_path / "moved"
    assert {opened.file(item) for item in opened} == {tmp_path / "moved" / name for name in COLOURS}


def test_merged_databases_find_their_pictures(built, folder, tmp_path):
    assert Database.merge([built, built]).pictures == built.pictures
    other = tmp_path / "other"
    other.mkdir()
    Image.new("RGB", (9, 9), "green").save(other / "green.png")
    merged = Database.merge([built, Database.build(other, ColourEncoder())])
    files = {merged.file(item) for item in merged}
    assert files == {*(folder / name for name in COLOURS), other / "green.png"}


def test_merged_databases_keep_the_places_of_lost_pictures(built, folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    Image.new("RGB", (9, 9), "green").save(other / "green.png")
    folder.rename(tmp_path / "away")
    merged = Database.merge([built, Database.build(other, ColourEncoder())])
    assert {merged.file(item) for item in merged} == {None, other / "green.png"}
    (tmp_path / "away").rename(folder)
    assert {folder / name for name in COLOURS} < {merged.file(item) for item in merged}


def test_devices(built, tmp_path):
    built.save(tmp_path / "db")
    assert Database.open(tmp_path / "db", device="cpu").to("cpu").index.device == "cpu"
    for call in (built.to, lambda device: Database.open(tmp_path / "db", device=device)):
        with pytest.raises(ValueError, match="device: must be cpu, cuda or cuda:N, got 'tpu'"):
            call("tpu")


def test_merge_keeps_every_row(built, folder):
    twice = Database.merge([built, built])
    assert len(twice) == 2 * len(built)
    (found,) = twice.search(query("red"), 2)
    assert [n.item.name for n in found] == ["red", "red"]
    assert found[0].score == found[1].score
    with pytest.raises(ValueError, match="at least one"):
        Database.merge([])


def test_transparency_is_laid_on_white(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert np.asarray(read_image(tmp_path / "clear.png")).min() == 255


def test_more_images_than_one_atlas_holds(tmp_path, monkeypatch):
    monkeypatch.setattr("knnfast.images.ATLAS_SIDE", 2)
    encoder = ColourEncoder()
    db = Database(encoder.card, thumbnail_size=16)
    shades = [Image.new("RGB", (16, 16), (25 * n, 0, 0)) for n in range(9)]
    db.add(encoder.encode_images(shades), shades, names=[str(n) for n in range(9)])
    db.save(tmp_path / "db")
    opened = Database.open(tmp_path / "db")
    for n in range(9):
        assert abs(int(np.asarray(opened.thumbnail(n))[8, 8, 0]) - 25 * n) < 12
