"""Weights of one's own, end to end by the command line, and what goes wrong on the way.

Tiny untrained models stand in for real ones, in the same files: an open_clip folder, and a VQ
autoencoder with the configuration and the parameter names of VQ-Diffusion's published one.
"""

import json

import pytest
import torch
from click.testing import CliRunner
from PIL import Image, ImageDraw

from knnfast import Database, KNNDiffusion
from knnfast.cli import main
from knnfast.diffusion.tokenizer import TokenizerConfig, VQTokenizer

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(Failed to load image|pkg_resources|timm|QuickGELU)"
)


def invoke(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for n, colour in enumerate(["red", "green", "blue", "orange"]):
        image = Image.new("RGB", (40, 30), "white")
        ImageDraw.Draw(image).ellipse([4 + n, 4, 24 + n, 26], fill=colour)
        image.save(folder / f"{colour}.jpg")
    return folder


@pytest.fixture(scope="module")
def vqvae(tmp_path_factory):
    """As the folder `vqvae` of microsoft/vq-diffusion-ithq, which leaves VQModel's sample_size."""
    torch.manual_seed(0)
    config = TokenizerConfig(
        block_out_channels=(8, 8, 16), layers_per_block=2, latent_channels=8, vq_embed_dim=8,
        num_vq_embeddings=32, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"),
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("vqvae")
    VQTokenizer(config).save(folder)
    return folder


@pytest.mark.parametrize("backbone", ["discrete", "continuous"])
def test_open_clip_and_a_vqvae_drive_everything(
    backbone, photos, vqvae, open_clip_folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(photos)  # from where a database's sources are found
    if backbone == "continuous":
        pytest.importorskip("diffusers")
    encoder = f"open_clip:local-dir:{open_clip_folder[0]}"
    db, run = tmp_path / "db", tmp_path / "run"
    result = invoke("database", "build", photos, "--encoder", encoder, "--out", db)
    assert result.exit_code == 0, result.output
    options = [
        "train", db, "--encoder", encoder, "--tokenizer", vqvae, "--image-size", 16,
        "--backbone", backbone, "--steps", 1, "--batch", 4, "--versions", 2, "--precision", "fp32",
    ]  # fmt: skip
    result = invoke(*options, "--out", run)
    assert result.exit_code == 0, result.output
    model = run / "model"
    assert json.loads((model / "model.json").read_text())["encoder"] == encoder
    again = invoke("database", "build", photos, "--encoder", model, "--out", tmp_path / "again")
    assert again.exit_code == 0, again.output
    for extra in ([], ["--database", db]):
        result = invoke(
            "generate", "a red circle", "--model", model, "--k", 3, "--steps", 2, "--seed", 0,
            "--out", tmp_path / "out", "--json", *extra,
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        report = json.loads(result.stdout)
        names = {n["name"] for n in report["neighbours"][0]}
        assert len(names) == 3
        assert names < {"red", "green", "blue", "orange"}
        with Image.open(report["files"][0]) as image:
            assert image.size == (16, 16)

    if backbone == "discrete":  # told before anything is encoded
        odd = [20 if word == 16 else word for word in options]
        result = invoke(*odd, "--out", tmp_path / "odd")
        assert result.exit_code == 2
        assert "grid (5, 5) of codes is not a multiple of patch 2" in result.stderr
        assert not (tmp_path / "odd").exists()

    other = {"discrete": "continuous", "continuous": "discrete"}[backbone]
    (run / "model").rename(tmp_path / "aside")
    options[options.index("--backbone") + 1] = other
    before = (run / "state.safetensors").read_bytes()
    result = invoke(*options, "--out", run)
    assert result.exit_code == 2
    assert "state.safetensors: was trained with another backbone" in result.stderr
    assert (run / "state.safetensors").read_bytes() == before
    refused = invoke("generate", "x", "--model", tmp_path / "aside", "--backbone", other)
    assert f"holds {backbone}, not '{other}'" in refused.stderr


# ---- bad input ----------------------------------------------------------------------------------


def failed(*arguments):
    """The line that a refused command ends with."""
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    line = result.stderr.splitlines()[-1]
    assert line.startswith("error: ")
    return line


def test_a_folder_with_no_image(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "notes.txt").write_text("nothing to see")
    out = tmp_path / "out"
    line = failed("database", "build", empty, "--encoder", "stickers", "--out", out)
    assert str(empty) in line
    line = failed("train", empty, "--out", out)
    assert "two readable images" in line
    assert not list(tmp_path.glob("out/**/*.safetensors"))


def test_a_database_of_one_image(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(photos)
    for extra in list(photos.iterdir())[1:]:
        extra.unlink()
    db = tmp_path / "db"
    assert invoke("database", "build", photos, "--encoder", "stickers", "--out", db).exit_code == 0
    one = ("generate", "a circle", "--database", db, "--steps", 2, "--out", tmp_path / "out")
    assert "k: must be 1 ... 1 (the size of the database), got 10" in failed(*one, "--k", 10)
    result = invoke(*one, "--json")
    assert result.exit_code == 0, result.output
    assert len(json.loads(result.stdout)["neighbours"][0]) == 1
    assert "two readable images" in failed("train", db, "--out", tmp_path / "run")


def test_a_foreign_or_missing_tokenizer(photos, open_clip_folder, vqvae, tmp_path):
    out = ("--out", tmp_path / "run")
    assert "config.json" in failed("train", photos, "--tokenizer", tmp_path / "no", *out)
    (tmp_path / "vq").mkdir()
    for file in vqvae.iterdir():
        (tmp_path / "vq" / file.name).write_bytes(file.read_bytes())
    config = json.loads((vqvae / "config.json").read_text())
    config["block_out_channels"] = [8, 16, 16]
    (tmp_path / "vq" / "config.json").write_text(json.dumps(config))
    line = failed("train", photos, "--tokenizer", tmp_path / "vq", *out)
    assert "weights of another architecture" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("size", [100, 20_000, 1_000_000])
def test_a_full_disk_leaves_nothing_half_written(size, tmp_path, full_disk):
    pipe = KNNDiffusion.from_pretrained("stickers", backbone="discrete")
    with full_disk(size), pytest.raises(OSError, match=r"large|written|Errno"):
        pipe.save_pretrained(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
    with full_disk(size), pytest.raises(OSError, match=r"large|written|Errno"):
        pipe.database.save(tmp_path / "db")
    assert list(tmp_path.iterdir()) == []

    pipe.databases["animals"].save(tmp_path / "db")
    before = {p: p.read_bytes() for p in (tmp_path / "db").rglob("*") if p.is_file()}
    with full_disk(size), pytest.raises(OSError, match=r"large|written|Errno"):
        pipe.database.save(tmp_path / "db")
    assert {p: p.read_bytes() for p in (tmp_path / "db").rglob("*") if p.is_file()} == before
    assert len(Database.open(tmp_path / "db")) == len(pipe.databases["animals"])
