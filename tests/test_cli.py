"""The command line: what it writes, and one clear line with exit code 2 for bad input."""

import json

import pytest
from click.testing import CliRunner
from PIL import Image

from knnfast.cli import main


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


def test_database_build_info_merge(folder, tmp_path):
    out = tmp_path / "db"
    result = invoke("database", "build", folder, "--encoder", "stickers", "--out", out)
    assert result.exit_code == 0, result.output
    assert "3 images, 1 damaged" in result.output
    info = json.loads(invoke("database", "info", out, "--json").stdout)
    assert info["images"] == 3
    merged = invoke("database", "merge", out, out, "--out", tmp_path / "both")
    assert "6 images" in merged.output
    images = invoke(
        "generate", "red", "--k", 2, "--steps", 2, "--database", out, "--out", tmp_path / "o"
    )
    assert images.exit_code == 0, images.output


def test_database_build_wants_a_batch(folder, tmp_path):
    out = tmp_path / "db"
    build = ("database", "build", folder, "--encoder", "stickers", "--out", out)
    result = invoke(*build, "--batch-size", 0)
    assert result.exit_code == 2
    assert "batch_size: must be at least 1, got 0" in result.output
    assert not out.exists()


def test_train_on_a_folder_then_generate(folder, tmp_path):
    (folder / "broken.png").unlink()
    out = tmp_path / "run"
    arguments = ("--steps", 2, "--batch", 4, "--versions", 2, "--out", out)
    result = invoke("train", folder, *arguments)
    assert result.exit_code == 0, result.output
    again = invoke("train", folder, *arguments)
    assert again.exit_code == 2
    assert "exists already" in again.stderr
    images = invoke(
        "generate", "red", "--k", 2, "--steps", 2, "--model", out / "model", "--out", tmp_path / "o"
    )
    assert images.exit_code == 0, images.output


def test_info():
    report = json.loads(invoke("info", "--json").stdout)
    assert set(report["databases"]) == {"stickers", "animals"}


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


def test_an_image_that_is_none(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    result = invoke("generate", "--image", tmp_path / "text.png", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "text.png" in result.stderr
    assert not (tmp_path / "out").exists()


def test_debug_shows_the_traceback():
    result = invoke("--debug", "database", "info", "nowhere")
    assert isinstance(result.exception, FileNotFoundError)
