"""The command line: what it writes, and one clear line with exit code 2 for bad input."""

import itertools
import json
import shutil
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from knnfast import _C, KNNDiffusion, _files
from knnfast.cli import main
from knnfast.cli import train as module
from knnfast.cli._shared import find_encoder
from knnfast.database import Database
from knnfast.diffusion import augment, data, pairs
from knnfast.diffusion.augment import PHOTOS, STICKERS
from knnfast.diffusion.denoiser import Denoiser, DenoiserConfig
from knnfast.diffusion.pairs import ConditionConfig
from knnfast.diffusion.unet import UNetConfig
from knnfast.pipeline import BUNDLES, Interrupted, encoder_of


def invoke(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "images"
    root.mkdir()
    for n, colour in enumerate(["red", "green", "blue"]):
        Image.new("RGB", (32, 32), colour).save(root / f"{colour}-{n}.png")
    (root / "broken.png").write_text("no image")
    return root


def test_generate_writes_images_and_a_sheet(tmp_path):
    result = invoke("generate", "pizza", "-n", 2, "--steps", 2, "--seed", 4, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["pizza-4-0.png", "pizza-4-1.png", "pizza-4-sheet.png"]
    assert "seed 4" in result.output
    for phase in ("encode", "search", "denoise", "decode"):
        assert phase in result.output


def test_ctrl_c_keeps_the_images_that_are_finished(tmp_path, monkeypatch):
    def interrupt(bar, done, total):
        if done == at:
            raise KeyboardInterrupt

    monkeypatch.setattr("knnfast.cli._shared.Bar.__call__", interrupt)
    words = ("generate", "pizza", "-n", 40, "--steps", 1, "--seed", 4, "--out")
    at = 1  # of two batches
    result = invoke(*words, tmp_path / "none")
    assert result.exit_code == 1
    assert "stopped: no image was finished, none is written" in result.stderr
    assert not (tmp_path / "none").exists()
    at = 2
    result = invoke(*words, tmp_path / "some")
    assert result.exit_code == 130
    assert "stopped: 32 of 40 images are written" in result.stderr
    names = {path.name for path in (tmp_path / "some").iterdir()}
    assert names == {f"pizza-4-{n}.png" for n in range(32)}
    whole = KNNDiffusion.from_pretrained("stickers")("pizza", num_images=32, steps=1, seed=4)
    with Image.open(tmp_path / "some" / "pizza-4-31.png") as image:
        assert image.tobytes() == whole.images[31].tobytes()


@pytest.mark.parametrize("call", ["knnfast.sheet.contact_sheet", "knnfast._files.write_atomic"])
def test_ctrl_c_after_the_last_image_keeps_all(call, tmp_path, monkeypatch):
    name, calls = call.rpartition(".")[2], itertools.count()
    write = _files.write_atomic

    def interrupt(*arguments):
        if next(calls) == 0:
            raise KeyboardInterrupt
        write(*arguments)

    monkeypatch.setattr(call, interrupt)
    result = invoke("generate", "pizza", "-n", 2, "--steps", 1, "--seed", 4, "--out", tmp_path)
    assert result.exit_code == 130, name
    assert result.stderr == f"stopped: 2 of 2 images are written to {tmp_path}, and no sheet\n"
    assert {path.name for path in tmp_path.iterdir()} == {"pizza-4-0.png", "pizza-4-1.png"}


def test_ctrl_c_while_pixels_are_made_keeps_the_batches_before(monkeypatch):
    pipe = KNNDiffusion.from_pretrained("stickers")
    decode, count = pipe.tokenizer.decode, itertools.count(1)

    def interrupt(codes):
        if next(count) == 5:
            raise KeyboardInterrupt
        return decode(codes)

    monkeypatch.setattr(pipe.tokenizer, "decode", interrupt)
    with pytest.raises(Interrupted, match="3 images were finished") as stopped:
        pipe("pizza", num_images=7, batch_size=3, steps=1, seed=4)
    assert len(stopped.value.output.images) == 3


def test_prompts_with_one_slug_keep_their_pictures(tmp_path):
    result = invoke("generate", "C++", "C", "c", "--steps", 1, "--seed", 4, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["c-2-4-0.png", "c-3-4-0.png", "c-4-0.png", "c-4-sheet.png"]


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--device", "foo", "--device: must be cpu, cuda or cuda:N, got 'foo'"),
        ("--device", "cuda:99", "CUDA devices here, got 'cuda:99'"),
        ("--sheet", "sheet.xyz", "--sheet: must end in .png, got sheet.xyz"),
    ],
)
def test_bad_options_are_told_before_anything_is_written(tmp_path, option, value, message):
    out = tmp_path / "out"
    result = invoke("generate", "pizza", "--out", out, option, value)
    assert result.exit_code == 2
    assert message in result.output
    assert not out.exists()


@pytest.mark.parametrize(("option", "value"), [("--lr", 0), ("--lr", "nan"), ("--seed", -1)])
def test_train_checks_its_settings_first(folder, tmp_path, option, value):
    result = invoke("train", folder, "--out", tmp_path / "run", option, value)
    assert result.exit_code == 2
    assert f"{option[2:]} must be" in result.output
    assert not (tmp_path / "run").exists()


def test_generate_json(tmp_path):
    result = invoke("generate", "pizza", "--steps", 2, "--seed", 4, "--out", tmp_path, "--json")
    report = json.loads(result.stdout)
    assert report["seed"] == 4
    assert len(report["neighbours"][0]) == 10
    with Image.open(report["files"][0]) as image:
        assert image.size == (64, 64)


def test_a_sheet_that_cannot_be_drawn_leaves_the_images(tmp_path, monkeypatch):
    def lost(*args):
        raise FileNotFoundError("thumbnails-0.webp: gone")

    monkeypatch.setattr("knnfast.sheet.contact_sheet", lost)
    words = ("generate", "pizza", "--steps", 2, "--seed", 4, "--out", tmp_path)
    result = invoke(*words)
    assert result.exit_code == 0, result.output
    assert "no sheet: thumbnails-0.webp: gone" in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["pizza-4-0.png"]
    assert json.loads(invoke(*words, "--json").stdout)["sheet"] is None


def test_names_of_a_foreign_database_steer_no_terminal(folder, tmp_path):
    out = tmp_path / "db"
    assert invoke("database", "build", folder, "--encoder", "stickers", "--out", out).exit_code == 0
    db = Database.open(out)
    for i, item in db._items.items():
        db._items[i] = replace(item, name=f"\x1b[31m{item.name}", group="\x1b[32m")
    db.save(out)
    search = ("database", "search", out, "red", "--encoder", "stickers")
    draw = ("generate", "red", "--k", 2, "--steps", 1, "--database", out, "--out", tmp_path / "o")
    for words in (search, draw, ("database", "info", out)):
        shown = invoke(*words).output
        assert "\ufffd[3" in shown
        assert "\x1b" not in shown


def test_database_is_replaced_only_when_told_to(folder, tmp_path):
    build = ("build", folder, "--encoder", "stickers")
    for name in ("all", "two"):
        assert invoke("database", *build, "--out", tmp_path / name).exit_code == 0
        (folder / "blue-2.png").unlink(missing_ok=True)
    out = tmp_path / "all"
    for command in (build, ("merge", tmp_path / "two")):
        refused = invoke("database", *command, "--out", out)
        assert refused.exit_code == 2
        assert f"--out: {out} is a database already; --replace writes over it" in refused.stderr
        assert json.loads(invoke("database", "info", out, "--json").stdout)["images"] == 3
    assert invoke("database", "merge", tmp_path / "two", "--out", out, "--replace").exit_code == 0
    assert json.loads(invoke("database", "info", out, "--json").stdout)["images"] == 2


@pytest.mark.parametrize(
    "words",
    [
        ["add", "stickers", "{folder}", "--encoder", "stickers"],
        ["merge", "stickers", "--out", "{out}"],
    ],
)
def test_a_model_is_no_database_to_add_to(words, folder, tmp_path):
    words = [word.format(folder=folder, out=tmp_path / "out") for word in words]
    result = invoke("database", *words)
    assert result.exit_code == 2
    own = BUNDLES / "stickers" / "databases" / "stickers"
    assert f"stickers is a model; give a database's folder, as {own}" in result.stderr


@pytest.mark.parametrize("command", ["generate", "edit"])
def test_a_database_is_given_once(command, folder):
    words = {"generate": ["pizza"], "edit": [folder / "red-0.png", "blue"]}[command]
    result = invoke(command, *words, "--database", "animals", "--database", "stickers")
    assert result.exit_code == 2
    assert "--database: give one; `knnfast database merge` makes one of several" in result.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-n", 0], "error: -n: must be 1"),
        (["--image-weight", 2], "error: --image-weight: must lie in [0, 1], got 2.0"),
        (["--group", "nowhere"], "error: --group: "),
    ],
)
def test_a_message_names_the_option(words, message, tmp_path):
    result = invoke("generate", "pizza", *words, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.parametrize("model", ["stickers", "stickers-edit"])
def test_database_info_of_a_model(model):
    found = json.loads(invoke("database", "info", model, "--json").stdout)
    assert [Path(each["path"]).name for each in found] == ["stickers", "animals"]
    for each in found:
        assert json.loads(invoke("database", "info", each["path"], "--json").stdout) == each


@pytest.mark.parametrize(
    "spec",
    [
        "stickers",
        "stickers-edit",
        "bundles/stickers",
        "bundles/stickers-edit",
        "bundles/stickers/encoder",
    ],
)
def test_an_encoder_is_found_by_name_and_by_folder(spec, monkeypatch):
    monkeypatch.chdir(BUNDLES.parent)
    assert find_encoder(spec, "cpu").card == encoder_of("stickers").card


def test_an_encoder_that_is_nowhere(folder, tmp_path):
    result = invoke("database", "build", folder, "--encoder", "stikers", "--out", tmp_path / "db")
    assert result.exit_code == 2
    assert "--encoder: " in result.stderr
    assert "model 'stikers': neither a bundle of the package (stickers" in result.stderr


def test_a_database_of_a_model_is_saved_anew(folder, tmp_path):
    root = tmp_path / "model"
    shutil.copytree(BUNDLES / "stickers", root)
    own, more = root / "databases" / "stickers", tmp_path / "more"
    built = invoke("database", "build", folder, "--encoder", root, "--out", more)
    assert built.exit_code == 0, built.output
    merged = invoke("database", "merge", own, more, "--out", own, "--replace")
    assert merged.exit_code == 0, merged.output
    assert len(KNNDiffusion.from_pretrained(root).database) == 1725 + 3


def test_database_add_and_search(folder, tmp_path):
    out = tmp_path / "db"
    (folder / "blue-2.png").rename(tmp_path / "later.png")
    assert invoke("database", "build", folder, "--encoder", "stickers", "--out", out).exit_code == 0
    (tmp_path / "later.png").rename(folder / "blue-2.png")
    added = invoke("database", "add", out, folder, "--encoder", "stickers")
    assert f"{out}: 1 image added, now 3, 1 damaged file skipped" in added.output
    again = invoke("database", "add", out, folder, "--encoder", "stickers", "--json")
    assert json.loads(again.stdout)["added"] == 0
    words = ("database", "search", out, "--encoder", "stickers", "--image", folder / "blue-2.png")
    found = json.loads(invoke(*words, "--k", 2, "--json").stdout)
    assert found["labels"] == ["image 1"]
    best = found["neighbours"][0][0]
    assert (best["name"], best["score"]) == ("blue-2", pytest.approx(1, abs=1e-3))
    lines = invoke("database", "search", "stickers", "pizza", "a red heart", "--k", 3).output
    assert lines.splitlines()[0] == "pizza:"
    assert "pizza" in lines.splitlines()[1]
    assert "a red heart:" in lines
    for words, message in (
        ((out, "pizza"), "--encoder: needed for a database"),
        (("stickers",), "prompts: give a prompt, or a picture (--image); got none"),
        (("stickers", "--image", folder), "--image: must be a file"),
        ((tmp_path / "none", "pizza"), "none"),
    ):
        refused = invoke("database", "search", *words)
        assert refused.exit_code == 2
        assert message in refused.stderr


def test_an_interrupted_database_add_keeps_what_it_embedded(folder, tmp_path, monkeypatch):
    from knnfast.encoders.small import SmallEncoder

    out, first = tmp_path / "db", tmp_path / "first"
    first.mkdir()
    (folder / "blue-2.png").rename(first / "blue-2.png")
    assert invoke("database", "build", first, "--encoder", "stickers", "--out", out).exit_code == 0
    encode, calls = SmallEncoder.encode_images, iter([False, True])

    def then_interrupt(self, images, batch_size):
        if next(calls):
            raise KeyboardInterrupt
        return encode(self, images, batch_size)

    monkeypatch.setattr(SmallEncoder, "encode_images", then_interrupt)
    added = invoke("database", "add", out, folder, "--encoder", "stickers", "--batch-size", 1)
    assert added.exit_code == 1
    assert "interrupted: 1 of the images stay added" in added.stderr
    assert len(Database.open(out)) == 2


def test_adding_goes_to_what_others_saved_meanwhile(folder, tmp_path, monkeypatch):
    from knnfast.encoders.small import SmallEncoder

    out, first = tmp_path / "db", tmp_path / "first"
    first.mkdir()
    (folder / "blue-2.png").rename(first / "blue-2.png")
    assert invoke("database", "build", first, "--encoder", "stickers", "--out", out).exit_code == 0
    encode = SmallEncoder.encode_images

    def while_another_adds(self, images, batch_size):
        monkeypatch.setattr(SmallEncoder, "encode_images", encode)
        theirs = Database.open(out)
        for colour, source in (("red", folder / "red-0.png"), ("pink", "")):  # ours and another
            rows = encode(self, [Image.new("RGB", (8, 8), colour)], 1)
            picture = Image.new("RGB", (8, 8), colour)
            theirs.add(rows, [picture], names=[colour], sources=[str(source)])
        theirs.save(out)
        return encode(self, images, batch_size)

    monkeypatch.setattr(SmallEncoder, "encode_images", while_another_adds)
    added = invoke("database", "add", out, folder, "--encoder", "stickers", "--json")
    assert added.exit_code == 0, added.output
    report = json.loads(added.stdout)
    assert (report["images"], report["added"]) == (4, 1)
    db = Database.open(out)
    assert [item.name for item in db] == ["blue-2", "red", "pink", "green-1"]
    assert [file and file.name for file in map(db.file, db)] == [
        "blue-2.png", "red-0.png", None, "green-1.png",
    ]  # fmt: skip
    assert all(db.thumbnail(i).size for i in db.ids.tolist())


def test_database_build_info_merge(folder, tmp_path):
    out = tmp_path / "db"
    result = invoke("database", "build", folder, "--encoder", "stickers", "--out", out)
    assert result.exit_code == 0, result.output
    assert "3 images, 1 damaged" in result.output
    info = json.loads(invoke("database", "info", out, "--json").stdout)
    assert info["images"] == 3
    (folder / "blue-2.png").unlink()
    less = tmp_path / "less"
    assert (
        invoke("database", "build", folder, "--encoder", "stickers", "--out", less).exit_code == 0
    )
    merge = ("database", "merge", out, less, "--out", tmp_path / "both")
    assert "5 images" in invoke(*merge).output
    merged = json.loads(invoke(*merge, "--replace", "--json").stdout)
    assert merged == {"path": str(tmp_path / "both"), "images": 5}
    shutil.copytree(out, tmp_path / "copy")
    for again in (out, out / ".." / "db", tmp_path / "copy"):
        twice = invoke("database", "merge", out, less, again, "--out", tmp_path / "twice")
        assert twice.exit_code == 2
        assert f"paths: {again} holds the same images as {out}" in twice.stderr
        assert not (tmp_path / "twice").exists()
    images = invoke(
        "generate", "red", "--k", 2, "--steps", 2, "--database", out, "--out", tmp_path / "o"
    )
    assert images.exit_code == 0, images.output


@pytest.mark.parametrize(
    ("command", "work"),
    [
        (["generate", "pizza"], "knnfast.pipeline.find_model"),
        (["edit", "{folder}/red-0.png", "blue"], "knnfast.pipeline.find_model"),
        (
            ["database", "build", "{folder}", "--encoder", "stickers"],
            "knnfast.encoders.load_encoder",
        ),
        (["database", "merge", "{folder}"], "knnfast.database.Database.open"),
        (["train", "{folder}"], "knnfast.pipeline.find_model"),
        (["evaluate", "stickers", "--ablation", "k"], "knnfast.pipeline.find_model"),
    ],
)
def test_a_folder_that_cannot_be_written_is_told_first(
    command, work, folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(work, None)  # is not reached
    file = tmp_path / "file"
    file.write_text("here")
    places = [file, file / "below" / "it"]
    if Path("/proc").is_dir():  # where nobody may write, root neither
        places.append(Path("/proc/knnfast"))
    for out in places:
        result = invoke(*(part.format(folder=folder) for part in command), "--out", out)
        assert result.exit_code == 2, result.output
        assert f"error: --out: {out} cannot be" in result.stderr
        assert result.stderr.count("\n") == 1


def test_database_build_tells_a_foreign_folder_first(folder, monkeypatch):
    monkeypatch.setattr("knnfast.encoders.load_encoder", None)
    result = invoke("database", "build", folder, "--encoder", "stickers", "--out", folder)
    assert result.exit_code == 2
    assert "is a folder with other content" in result.stderr


def test_database_build_wants_a_batch(folder, tmp_path):
    out = tmp_path / "db"
    build = ("database", "build", folder, "--encoder", "stickers", "--out", out)
    result = invoke(*build, "--batch-size", 0)
    assert result.exit_code == 2
    assert "error: --batch-size: must be at least 1, got 0" in result.output
    assert not out.exists()


def test_train_on_a_folder_then_generate(folder, tmp_path):
    out = tmp_path / "run"
    arguments = ("--steps", 2, "--batch", 4, "--versions", 2, "--out", out)
    many = invoke("train", folder, *arguments, "--k", 4)
    assert many.exit_code == 2
    assert "--k: must be at most 3, the readable images, got 4" in many.stderr
    (folder / "broken.png").unlink()
    result = invoke("train", folder, *arguments)
    assert result.exit_code == 0, result.output
    config = json.loads((out / "training.json").read_text())["config"]
    assert config["condition"]["k"] == 2  # all others
    again = invoke("train", folder, *arguments)
    assert again.exit_code == 2
    assert "exists already" in again.stderr
    images = invoke(
        "generate", "red", "--k", 2, "--steps", 2, "--model", out / "model", "--out", tmp_path / "o"
    )
    assert images.exit_code == 0, images.output
    for options, message in (
        ([], "database 'training': 3 images, fewer than 10; names are the prompts"),
        (["--other-prompts", 3], "--other-prompts: needs a second database"),
        (["--ablation", "k"], "'k = 5' searches 5 neighbours in 100% of database 'training'"),
    ):
        evaluated = invoke("evaluate", out / "model", *options)
        assert evaluated.exit_code == 2
        assert message in evaluated.stderr


def test_train_counts_the_images_that_can_be_read(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("knnfast.pipeline.find_model", None)  # is not reached
    for name in ("red-0", "green-1", "blue-2"):
        (folder / f"{name}.png").write_text("no image")
    result = invoke("train", folder, "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert "data: needs at least two readable images, found 0" in result.stderr


def test_train_refuses_a_folder_with_other_content(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("knnfast.pipeline.find_model", None)  # is not reached
    out = tmp_path / "out"
    out.mkdir()
    (out / "a.txt").write_text("mine")
    result = invoke("train", folder, "--k", 2, "--out", out)
    assert result.exit_code == 2
    assert f"--out: {out} is a folder with other content" in result.stderr
    assert [path.name for path in out.iterdir()] == ["a.txt"]


def test_train_reads_a_databases_pictures_where_they_lie_now(folder, tmp_path, monkeypatch):
    db, moved, seen = tmp_path / "db", tmp_path / "moved", []

    def train(source, *args, **options):
        seen.append(source.pictures)
        raise SeenError

    assert invoke("database", "build", folder, "--encoder", "stickers", "--out", db).exit_code == 0
    assert str(folder.resolve()) in invoke("database", "info", db).output
    folder.rename(moved)
    monkeypatch.setattr("knnfast.diffusion.training.train", train)
    invoke("train", db, "--pictures", moved, "--out", tmp_path / "run")
    assert seen == [moved]
    for at, pictures in ((db, folder), (moved, moved)):
        refused = invoke("train", at, "--pictures", pictures, "--out", tmp_path / "run")
        assert refused.exit_code == 2
        assert (
            f"--pictures: must be a folder, and DATA a database, got {pictures}" in refused.stderr
        )


def test_a_warning_is_a_line(folder, tmp_path, monkeypatch):
    def train(*args, **options):
        warnings.warn("skipped one", stacklevel=1)
        raise KeyboardInterrupt

    monkeypatch.setattr("knnfast.diffusion.training.train", train)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        result = invoke("train", folder, "--k", 2, "--out", tmp_path / "run")
    assert [line for line in result.stderr.splitlines() if line] == [
        "warning: skipped one",
        f"{tmp_path / 'run'}: stopped; the same command goes on from here",
        "Aborted!",
    ]


def test_info():
    report = json.loads(invoke("info", "--json").stdout)
    assert set(report["databases"]) == {"stickers", "animals"}
    assert report["cpu_kernels"] == _C.isa()
    assert report["threads"] == _C.num_threads()


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", ""],
        ["generate"],
        ["generate", "pizza", "--k", 0],
        ["generate", "pizza", "--k", 999999],
        ["generate", "pizza", "--steps", 0],
        ["generate", "pizza", "--database", "nowhere"],
        ["generate", "pizza", "--model", "nowhere"],
        ["generate", "--image", "nowhere.png"],
        ["database", "build", "nowhere", "--encoder", "stickers", "--out", "db"],
        ["database", "info", "nowhere"],
        ["train", "nowhere", "--out", "run"],
        ["train", "nowhere", "--out", "run", "--steps", 0],
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_image_that_is_a_folder(folder, tmp_path):
    result = invoke("generate", "--image", folder, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert f"--image: must be a file, {folder} is a folder" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "allowed"), [("k", "1 ... 136"), ("steps", "at least 1"), ("prompts", "at least 4")]
)
def test_evaluate_checks_its_settings_first(option, allowed, monkeypatch):
    monkeypatch.setattr("knnfast.evaluate.Panel", None)  # is not reached
    result = invoke("evaluate", "stickers", f"--{option}", 0)
    assert result.exit_code == 2
    assert f"{option}: must be {allowed}" in result.stderr


def test_an_image_that_is_none(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    result = invoke("generate", "--image", tmp_path / "text.png", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "text.png" in result.stderr
    assert not (tmp_path / "out").exists()


def test_debug_shows_the_traceback():
    result = invoke("--debug", "database", "info", "nowhere")
    assert isinstance(result.exception, FileNotFoundError)


class SeenError(Exception):
    """What a command hands to the call behind it."""


def keywords(monkeypatch, target, *words):
    """The keyword arguments with which a command calls `target`."""
    seen = {}

    def call(*args, **options):
        seen.update(options)
        raise SeenError

    monkeypatch.setattr(target, call)
    result = invoke(*words)
    assert isinstance(result.exception, SeenError), result.output
    return seen


def test_options_of_generate_arrive(monkeypatch):
    words = ["generate", "pizza", "--image-weight", 0.25, "-n", 3, "--k", 4, "--steps", 7,
             "--guidance", 1.5, "--truncation", 0.75, "--purity", 0.5, "--solver", "ddim",
             "--seed", 9, "--group", "food", "--group", "drinks", "--no-query"]  # fmt: skip
    call = "knnfast.pipeline.KNNDiffusion.__call__"
    seen = keywords(monkeypatch, call, *words)
    wanted = {
        "image": None, "image_weight": 0.25, "num_images": 3, "k": 4, "steps": 7, "guidance": 1.5,
        "truncation": 0.75, "purity": 0.5, "solver": "ddim", "seed": 9,
        "groups": ["food", "drinks"], "use_query": False, "use_neighbours": True,
    }  # fmt: skip
    assert {name: seen[name] for name in wanted} == wanted
    seen = keywords(monkeypatch, call, "generate", "pizza", "--no-neighbours")
    assert (seen["use_query"], seen["use_neighbours"], seen["groups"]) == (True, False, None)


def test_options_of_edit_arrive(folder, monkeypatch):
    words = ["edit", folder / "red-0.png", "green", "--strength", 0.5, "-n", 3, "--image-weight",
             0.25, "--keep", 0.4, "--k", 4, "--steps", 7, "--guidance", 1.5, "--truncation", 0.75,
             "--seed", 9, "--group", "food"]  # fmt: skip
    wanted = {
        "mask": None, "strength": 0.5, "num_images": 3, "image_weight": 0.25, "keep": 0.4, "k": 4,
        "steps": 7, "guidance": 1.5, "truncation": 0.75, "seed": 9, "groups": ["food"],
    }  # fmt: skip
    seen = keywords(monkeypatch, "knnfast.pipeline.KNNDiffusion.edit", *words)
    assert {name: seen[name] for name in wanted} == wanted


@pytest.mark.filterwarnings("ignore:Failed to load image")  # of a torchvision for another torch
def test_options_of_train_arrive(folder, tmp_path, monkeypatch):
    words = ["train", folder, "--out", tmp_path / "run", "--steps", 5, "--batch", 6, "--accumulate",
             2, "--lr", 0.01, "--k", 3, "--versions", 4, "--condition", "lafite", "--noise", 0.5,
             "--importance", "--candidates", 17, "--checkpoint-every", 11, "--precision", "bf16",
             "--augment", "stickers", "--crop", "center", "--seed", 8,
             "--from", "stickers"]  # fmt: skip
    call = "knnfast.diffusion.training.train"
    seen = keywords(monkeypatch, call, *words)
    config, wanted = seen["config"], {
        "steps": 5, "batch": 6, "accumulate": 2, "lr": 0.01, "importance": True, "candidates": 17,
        "checkpoint_every": 11, "bf16": True, "seed": 8,
    }  # fmt: skip
    assert {name: getattr(config, name) for name in wanted} == wanted
    assert config.condition == replace(
        ConditionConfig(k=3).preset("lafite", 0.5), semantic=config.condition.semantic
    )
    assert (seen["versions"], seen["augmentation"], seen["crop"]) == (4, STICKERS, "center")
    assert isinstance(seen["start"], Denoiser)
    assert seen["model"] is None  # as it starts
    seen = keywords(monkeypatch, call, "train", folder, "--out", tmp_path / "run", "--k", 3,
                    "--backbone", "continuous", "--precision", "fp32")  # fmt: skip
    assert (seen["config"].lr, seen["config"].bf16, seen["start"]) == (None, False, None)
    assert (seen["augmentation"], seen["crop"]) == (PHOTOS, None)
    assert isinstance(seen["model"], UNetConfig)


def test_settings_of_train_from_a_file(folder, tmp_path, monkeypatch):
    """A file changes what no option says; what an option says stays."""
    file, out = tmp_path / "settings.json", tmp_path / "run"
    sections = {
        "model": {"width": 64, "depth": 2, "schedule": "mask_replace", "canvas_layers": [1]},
        "condition": {"k": 2, "exclude": 0.5, "null": 0.2, "near": 0.9, "semantic": 99},
        "train": {"steps": 7, "batch": 6, "lr": 0.5, "bf16": True, "ema": 0.5},
        "augmentation": {"mirror": 0.0},
    }
    file.write_text(json.dumps(sections))
    words = ("train", folder, "--out", out, "--config", file, "--condition", "paper")
    call = "knnfast.diffusion.training.train"
    seen = keywords(monkeypatch, call, *words, "--steps", 9, "--augment", "stickers")
    paper = ConditionConfig(k=2).preset("paper")
    condition = replace(paper, exclude=0.5, null=0.2, near=0.9, semantic=99)
    config = seen["config"]
    assert config.condition == condition
    assert (config.steps, config.batch, config.lr, config.bf16, config.ema) == (
        9,
        6,
        0.5,
        True,
        0.5,
    )
    assert seen["augmentation"] == replace(STICKERS, mirror=0.0)
    assert seen["model"].to_dict() == {**DenoiserConfig().to_dict(), **sections["model"]}
    seen = keywords(monkeypatch, call, *words, "--k", 3, "--lr", 0.1, "--precision", "fp32")
    config = seen["config"]
    assert (config.condition.k, config.lr, config.bf16) == (3, 0.1, False)
    for raw, message in (
        (
            {"modle": {}},
            "section must be one of model, condition, train, augmentation, got 'modle'",
        ),
        ({"train": 3}, "train must be an object, got 3"),
        ({"train": {"seed": -1}}, "train: seed must be in [0, 2^64), got -1"),
        ({"model": {"depth": "4"}}, "model: depth must be int, got '4'"),
        ({"augmentation": {"fill": "grey"}}, "augmentation: fill must be one of mirror, white"),
        ({"condition": {"whole": 0.5}}, "condition: unknown settings ['whole']"),
    ):
        file.write_text(json.dumps(raw))
        result = invoke(*words)
        assert result.exit_code == 2
        assert f"{file}: {message}" in result.stderr
    file.write_text(json.dumps({"model": {}}))
    result = invoke(*words, "--from", "stickers")
    assert "model: --from has sizes of its own" in result.stderr
    assert "noise: paper adds none, got 0.5" in invoke(*words, "--noise", 0.5).stderr
    assert not out.exists()


def test_a_start_gives_encoder_and_tokenizer(folder, tmp_path, monkeypatch):
    """A denoiser draws the codes of one tokenizer, from one encoder's embeddings."""
    asked = []
    monkeypatch.setattr(
        KNNDiffusion, "from_pretrained", lambda name, **_: asked.append(name) or 1 / 0
    )
    for words in (["--from", "mine"], [], ["--from", "mine", "--model", "other"]):
        invoke("train", folder, "--k", 2, "--out", tmp_path / "run", *words)
    assert asked == ["mine", "stickers", "other"]


def test_the_choices_of_train():
    assert module.CONDITIONS == pairs.PRESETS
    assert tuple(augment.KINDS) == module.AUGMENT
    assert module.CROPS == data.CROPS


def test_a_missing_library_is_told_before_pictures_are_read(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    result = invoke("train", folder, "--backbone", "continuous", "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert "pip install '.[diffusion]'" in result.stderr
    assert not (tmp_path / "run").exists()


def test_train_an_editor_then_edit(folder, tmp_path, monkeypatch):
    pytest.importorskip("cv2")
    (folder / "broken.png").unlink()
    Image.new("RGB", (48, 32), "white").save(folder / "white.png")
    out = tmp_path / "run"
    train = ("train", folder, "--editor", "--steps", 1, "--batch", 4, "--versions", 2, "--k", 2,
             "--out", out)  # fmt: skip
    assert "--editor: needs --from" in invoke(*train).stderr
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "cv2", None)
        assert "pip install '.[edit]'" in invoke(*train, "--from", "stickers").stderr
    assert not out.exists()
    result = invoke(*train, "--from", "stickers")
    assert result.exit_code == 0, result.output
    assert json.loads((out / "training.json").read_text())["config"]["lr"] == 1e-3
    assert f'try: knnfast edit PICTURE "..." --model {out / "model"}' in result.output
    edited = invoke(
        "edit", folder / "red-0.png", "blue", "--k", 2, "--steps", 1, "-n", 1, "--model",
        out / "model", "--out", tmp_path / "o",
    )  # fmt: skip
    assert edited.exit_code == 0, edited.output
    plain = invoke("train", folder, "--k", 2, "--out", tmp_path / "plain", "--from", out / "model")
    assert "model: an editor; " in plain.stderr


def test_options_of_evaluate_arrive(monkeypatch):
    words = ["evaluate", "stickers", "--judge", "judge", "--inception", "weights", "--prompts", 7,
             "--other-prompts", 6, "--other-samples", 5, "--k", 4, "--steps", 3, "--guidance", 2.5,
             "--truncation", 0.5, "--seed", 9]  # fmt: skip
    wanted = {
        "inception": "weights", "prompts": 7, "other_prompts": 6, "other_samples": 5, "k": 4,
        "steps": 3, "guidance": 2.5, "truncation": 0.5, "seed": 9,
    }  # fmt: skip
    seen = keywords(monkeypatch, "knnfast.evaluate.evaluate", *words)
    assert {name: seen[name] for name in wanted} == wanted
    words = ["evaluate", "stickers", "--ablation", "backbone", "--judge", "judge", "--prompts", 7,
             "--seed", 9, "--continuous", "other"]  # fmt: skip
    monkeypatch.setattr(KNNDiffusion, "from_pretrained", lambda name, **options: (name, options))
    seen = keywords(monkeypatch, "knnfast.ablations.run", *words)
    assert (seen["judge"], seen["prompts"], seen["seed"]) == ("judge", 7, 9)
    assert seen["continuous"] == ("other", {"device": "cpu", "backbone": "continuous"})
