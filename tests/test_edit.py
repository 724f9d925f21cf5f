"""pipe.edit and `knnfast edit`: what changes, what stays, masks, files, bad input."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from knnfast.cli import main
from knnfast.database import Database
from knnfast.edit import cells_of, choose
from knnfast.edit_metrics import changed_region, pixels_of, psnr_outside
from knnfast.images import read_image
from knnfast.pipeline import BUNDLES, KNNDiffusion

QUICK = {"num_images": 2, "steps": 3, "seed": 0}


@pytest.fixture(scope="module")
def pipe():
    return KNNDiffusion.from_pretrained("stickers-edit")


def sticker(pipe, name):
    return pipe.database.thumbnail(next(i.id for i in pipe.database if i.name == name))


@pytest.fixture(scope="module")
def face(pipe):
    return sticker(pipe, "grinning face")


def test_an_edit_changes_a_part_and_ranks(pipe, face):
    out = pipe.edit(face, "sunglasses", **QUICK, strength=0.25)
    assert len(out.images) == 2
    assert out.region.sum() == round(0.25 * out.region.size)
    ranks = [e.score + 0.2 * e.identity for e in out.edits]
    assert ranks == sorted(ranks, reverse=True)
    before = np.asarray(out.original)
    redrawn = pixels_of(out.region, before.shape)
    assert redrawn.mean() == out.region.mean()
    for each in out.edits:
        assert 0 < each.changed <= 0.25
        assert 0 < changed_region(before, np.asarray(each.image)).mean() < 0.6
        assert psnr_outside(before, np.asarray(each.image), redrawn) > 25
    names = [n.item.name for n in out.neighbours]
    assert len(names) == 10
    assert "grinning face" not in names  # the picture itself says nothing new
    assert list(out.timings) == ["encode", "search", "locate", "denoise", "decode", "rank"]
    again = pipe.edit(face, "sunglasses", **QUICK, strength=0.25)
    other = pipe.edit(face, "sunglasses", **{**QUICK, "seed": 1}, strength=0.25)
    pixels = [np.stack([np.asarray(i) for i in o.images]) for o in (out, again, other)]
    np.testing.assert_array_equal(pixels[0], pixels[1])
    assert (pixels[0] != pixels[2]).any()


def test_sunglasses_come_over_the_eyes(pipe, face):
    """The place is found without a mask: more of the upper half than of the lower."""
    region = pipe.edit(face, "sunglasses", **QUICK, strength=0.25).region
    assert region[:8].sum() > region[8:].sum()


def test_half_precision_finds_the_same_place(pipe, face):
    half = KNNDiffusion.from_pretrained("stickers-edit", dtype=torch.bfloat16)
    regions = [p.edit(face, "sunglasses", **QUICK, strength=0.25).region for p in (pipe, half)]
    assert (regions[0] & regions[1]).sum() > 0.8 * regions[0].sum()


def test_a_mask_bounds_the_edit(pipe, face, tmp_path):
    mask = np.zeros((64, 64), bool)
    mask[40:64, 0:64] = True
    out = pipe.edit(face, "beard", mask=mask, **QUICK)
    np.testing.assert_array_equal(out.region, np.arange(16)[:, None].repeat(16, 1) >= 10)
    half = pipe.edit(face, "beard", mask=mask, strength=0.5, **QUICK)
    assert half.region.sum() == 48
    assert not (half.region & ~out.region).any()
    drawn = Image.fromarray(mask.astype(np.uint8) * 255)
    same = pipe.edit(face, "beard", mask=drawn, **QUICK)
    np.testing.assert_array_equal(np.asarray(same.images[0]), np.asarray(out.images[0]))


def test_cells_follow_the_pictures_padding():
    wide = Image.new("RGB", (128, 64))
    mask = np.zeros((64, 128), bool)
    mask[0, 127] = True
    assert np.argwhere(cells_of(mask, wide, (16, 16)).numpy()).tolist() == [[4, 15]]
    assert cells_of(None, wide, (4, 4)).all()


def test_choose_takes_the_largest_allowed_neighbourhood():
    difference = torch.zeros(6, 6)
    difference[1, 1] = 9.0
    difference[4, 4] = 3.0
    everywhere = torch.ones(6, 6, dtype=torch.bool)
    first = choose(difference, everywhere, 9)
    assert first[:3, :3].all()
    lower = everywhere.clone()
    lower[:3] = False
    second = choose(difference, lower, 9)
    assert second[3:, 3:].all()
    assert int(second.sum()) == 9


def test_metrics():
    before = np.zeros((8, 8, 3), np.uint8)
    after = before.copy()
    after[0, 0, 1] = 27  # more than a tenth
    after[7, 7] = 25  # less
    region = changed_region(before, after)
    assert region.sum() == 9
    assert region[:3, :3].all()
    want = -10 * math.log10((25 / 255) ** 2 / 55)
    assert psnr_outside(before, after, region) == pytest.approx(want)
    assert psnr_outside(before, before, region) == math.inf
    assert math.isnan(psnr_outside(before, after, np.ones((8, 8), bool)))
    cells = np.zeros((2, 4), bool)
    cells[1, 3] = True
    assert np.argwhere(pixels_of(cells, (4, 8))).tolist() == [[2, 6], [2, 7], [3, 6], [3, 7]]


def test_an_open_picture_is_edited_as_its_file(pipe, tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6  # a quarter to the right
    picture = Image.new("RGB", (64, 40), "white")
    picture.paste("red", (0, 0, 20, 40))
    picture.save(tmp_path / "turned.png", exif=turned)
    quick = {**QUICK, "num_images": 1, "steps": 1}
    with Image.open(tmp_path / "turned.png") as opened:
        given = pipe.edit(opened, "blue", mask=np.ones((64, 40), bool), **quick)
    file = pipe.edit(tmp_path / "turned.png", "blue", **quick)
    np.testing.assert_array_equal(np.asarray(given.original), np.asarray(file.original))
    assert not given.region[:, :2].any()  # a mask is of the picture's size when upright


def test_an_editor_generates_too(pipe):
    out = pipe("pizza", steps=2, seed=0)
    assert out.images[0].size == (64, 64)


def test_the_editor_stands_on_its_base(pipe, tmp_path, monkeypatch):
    plain = KNNDiffusion.from_pretrained("stickers")
    assert pipe.encoder.card == plain.encoder.card
    assert pipe.denoiser.config.source
    with pytest.raises(ValueError, match="no editor"):
        plain.edit(Image.new("RGB", (8, 8)), "a hat")
    pipe.save_pretrained(tmp_path / "whole")
    again = KNNDiffusion.from_pretrained(tmp_path / "whole")
    assert again.denoiser.config.source
    monkeypatch.chdir(BUNDLES / "stickers-edit")
    assert KNNDiffusion.from_pretrained(".").encoder.card == plain.encoder.card


@pytest.mark.parametrize("name", ["vq_diffusion", "mask_replace"])
def test_an_editor_that_replaces_codes_is_refused(pipe, face, name, monkeypatch):
    """Its last step draws kept codes anew, too."""
    monkeypatch.setattr(pipe.denoiser, "config", replace(pipe.denoiser.config, schedule=name))
    with pytest.raises(ValueError, match=f"schedule: an editor needs 'mask', .* got '{name}'"):
        pipe.edit(face, "sunglasses", **QUICK)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": " "}, "prompt"),
        ({"prompt": 3}, "prompt"),
        ({"strength": 0.0}, "strength"),
        ({"strength": 1.5}, "strength"),
        ({"strength": float("nan")}, "strength"),
        ({"image_weight": -0.1}, "image_weight"),
        ({"keep": -1.0}, "keep"),
        ({"guidance": float("inf")}, "guidance"),
        ({"num_images": 0}, "num_images"),
        ({"seed": -1}, "seed"),
        ({"k": 10**6}, "size of the database"),
        ({"steps": 0}, "steps"),
        ({"steps": [50, 0]}, "steps: expected a whole number"),
        ({"keep": "a"}, "keep: expected a number"),
        ({"image": Image.new("RGB", (0, 5))}, r"image: has no pixels, its size is \(0, 5\)"),
        ({"truncation": 0.0}, "truncation"),
        (
            {"mask": np.ones((8, 9), bool)},
            r"mask: must be \[64, 64\] as the image is, got \[8, 9\]",
        ),
        ({"mask": np.ones((64, 64))}, "bool"),
        ({"mask": np.zeros((64, 64), bool)}, "empty"),
        ({"image": "nowhere.png"}, "nowhere.png"),
        ({"image": 3}, "image"),
    ],
)
def test_rejects_before_anything_is_computed(pipe, face, arguments, message, monkeypatch):
    monkeypatch.setattr("knnfast.edit.pixels", None)
    with pytest.raises((ValueError, TypeError, OSError), match=message):
        pipe.edit(**{"image": face, "prompt": "a hat", **QUICK, **arguments})


def test_without_k_there_are_ten_or_as_many_as_there_are(pipe, face):
    few = {"where": lambda item: item.name in ("sunglasses", "glasses", "goggles")}
    out = pipe.edit(face, "sunglasses", **few, **QUICK)
    assert {n.item.name for n in out.neighbours} == {"sunglasses", "glasses", "goggles"}
    with pytest.raises(ValueError, match=r"k: must be 1 ... 3 \(what the filter leaves\), got 4"):
        pipe.edit(face, "sunglasses", k=4, **few, **QUICK)


@pytest.mark.parametrize(("before", "told"), [(-1.0, False), (1.0, True)])
def test_the_command_says_when_nothing_moved_towards_the_text(
    tmp_path, face, monkeypatch, before, told
):
    edit = KNNDiffusion.edit
    monkeypatch.setattr(
        KNNDiffusion, "edit", lambda *a, **options: replace(edit(*a, **options), score=before)
    )
    face.save(tmp_path / "face.png")
    quick = ["-n", "2", "--steps", "2", "--seed", "1", "--out", str(tmp_path)]
    done = CliRunner().invoke(main, ["edit", str(tmp_path / "face.png"), "with a hat", *quick])
    assert done.exit_code == 0, done.output
    assert ("No candidate moved towards the text" in done.stderr) == told


def test_an_edit_spares_what_a_small_part_of_a_mix_has(pipe, face):
    """The neighbours searched beyond k, for the picture itself, are no demand."""
    one = Database(pipe.encoder.card)
    one.add(pipe.encoder.encode_images([face]), [face], names=["own"])
    out = pipe.edit(face, "sunglasses", database={pipe.database: 0.9, one: 0.1}, **QUICK)
    assert len(out.neighbours) == 10


def test_an_edit_gives_each_database_of_a_mix_its_share(pipe, face):
    mix = {pipe.databases["stickers"]: 0.5, pipe.databases["animals"]: 0.5}
    out = pipe.edit(face, "sunglasses", database=mix, **QUICK)
    animals = {item.name for item in pipe.databases["animals"]}
    assert sum(n.item.name in animals for n in out.neighbours) == 5
    assert len(out.neighbours) == 10


def test_a_folder_is_no_picture(tmp_path):
    result = CliRunner().invoke(main, ["edit", str(tmp_path), "a hat", "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert result.stderr == f"error: {tmp_path}: is a folder; give a file\n"


def test_a_mask_is_off_where_it_is_transparent():
    picture = Image.new("RGB", (64, 64))
    drawn = Image.new("RGBA", (64, 64), (255, 255, 255, 0))
    drawn.paste((255, 255, 255, 255), (0, 0, 32, 64))
    cells = cells_of(drawn, picture, (4, 4))
    assert cells.tolist() == [[True, True, False, False]] * 4
    for mode in ("LA", "La", "RGBa"):
        again = cells_of(
            drawn.convert("LA" if mode == "La" else mode).convert(mode), picture, (4, 4)
        )
        assert again.tolist() == cells.tolist()


def test_command(face, tmp_path):
    face.save(tmp_path / "face.png")
    out = tmp_path / "out"
    quick = ["-n", "2", "--steps", "2", "--seed", "0", "--out", str(out)]
    done = CliRunner().invoke(
        main, ["edit", str(tmp_path / "face.png"), "with sunglasses", *quick, "--json"]
    )
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert [read_image(f).size for f in report["files"]] == [(64, 64)] * 2
    assert np.asarray(read_image(report["sheet"])).std() > 10
    assert len(report["edits"]) == 2
    assert not [p for p in out.iterdir() if p.name.startswith(".")]

    Image.new("L", (9, 9), 255).save(tmp_path / "mask.png")
    (tmp_path / "text.png").write_text("no picture")
    for arguments, message in (
        ([str(tmp_path / "nowhere.png"), "a hat"], "nowhere.png"),
        ([str(tmp_path / "text.png"), "a hat"], "text.png"),
        ([str(tmp_path / "face.png"), ""], "prompt"),
        ([str(tmp_path / "face.png"), "a hat", "--mask", str(tmp_path / "mask.png")], "mask"),
        ([str(tmp_path / "face.png"), "a hat", "--model", "stickers"], "no editor"),
        ([str(tmp_path / "face.png"), "a hat", "--strength", "2"], "strength"),
    ):
        bad = CliRunner().invoke(main, ["edit", *arguments])
        assert bad.exit_code == 2
        assert bad.stderr.startswith("error: ")
        assert message in bad.stderr
        assert bad.stderr.count("\n") == 1
