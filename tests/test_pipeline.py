"""KNNDiffusion on the embedded bundle: seeds, batches, databases, files, bad input."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from knnfast import Database, KNNDiffusion
from knnfast.diffusion.denoiser import Denoiser, DenoiserConfig
from knnfast.pipeline import databases_of, find_model
from knnfast.sheet import contact_sheet


@pytest.fixture(scope="module")
def pipe():
    return KNNDiffusion.from_pretrained("stickers")


def pixels(output):
    return np.stack([np.asarray(i) for i in output.images])


def test_output_has_its_parts(pipe):
    out = pipe(["a red heart", "pizza"], num_images=2, steps=4, k=5, seed=1)
    assert len(out.images) == 4
    assert out.images[0].size == (pipe.tokenizer.image_size, pipe.tokenizer.image_size)
    assert [len(n) for n in out.neighbours] == [5, 5]
    assert any("heart" in n.item.name for n in out.neighbours[0])
    assert any("pizza" in n.item.name for n in out.neighbours[1])
    assert list(out.timings) == ["encode", "search", "denoise", "decode"]
    scores = [n.score for n in out.neighbours[0]]
    assert scores == sorted(scores, reverse=True)


def test_same_seed_same_image(pipe):
    a = pipe("a red heart", steps=6, num_images=2, seed=7)
    b = pipe("a red heart", steps=6, num_images=2, seed=7)
    c = pipe("a red heart", steps=6, num_images=2, seed=8)
    np.testing.assert_array_equal(pixels(a), pixels(b))
    assert (pixels(a) != pixels(c)).any()
    assert (pixels(a)[0] != pixels(a)[1]).any()


def test_purity_changes_the_images(pipe):
    plain, pure = (
        pipe("pizza", steps=3, seed=1, purity=purity).images[0].tobytes() for purity in (None, 1.0)
    )
    assert plain != pure
    assert plain == pipe("pizza", steps=3, seed=1).images[0].tobytes()


def test_a_prompts_images_do_not_depend_on_the_batch(pipe):
    """100 images drawn 100 at a time and 7 at a time: the same pixels, every one."""
    prompts = ["rocket", "a red heart", "pizza", "guitar"]
    together, apart = (
        pixels(pipe(prompts, num_images=25, steps=2, seed=3, batch_size=size)) for size in (100, 7)
    )
    np.testing.assert_array_equal(together, apart)


def test_no_database_is_no_swap(pipe):
    before = pipe.database
    with pytest.raises(TypeError, match=r"database: .* got None"):
        pipe.database = None
    assert pipe.database is before


def test_databases_swap(pipe):
    def found(out):
        return {n.item.name for n in out.neighbours[0]}

    animals = pipe("a cat", database="animals", steps=2, seed=0)
    default = pipe("a cat", steps=2, seed=0)
    assert any("cat" in name for name in found(animals))
    assert found(animals).isdisjoint(found(default))
    assert (pixels(animals) != pixels(default)).any()
    pipe.database = "animals"
    try:
        assert found(pipe("a cat", steps=2, seed=0)) == found(animals)
    finally:
        pipe.database = "stickers"


def test_the_condition_switches_matter(pipe):
    both, query, neighbours = (
        pixels(pipe("pizza", steps=6, seed=5, use_query=q, use_neighbours=n))
        for q, n in ((True, True), (True, False), (False, True))
    )
    assert (both != query).any()
    assert (both != neighbours).any()


def test_an_image_is_a_query(pipe, tmp_path):
    picture = pipe.database.thumbnail(next(i.id for i in pipe.database if i.name == "pizza"))
    picture.save(tmp_path / "pizza.png")
    by_file = pipe(image=tmp_path / "pizza.png", steps=2, seed=0)
    assert by_file.neighbours[0][0].item.name == "pizza"
    both = pipe("pizza", image=picture, steps=2, seed=0)
    assert both.neighbours[0][0].item.name == "pizza"


def test_groups_restrict_the_search(pipe):
    group = next(iter(pipe.database.groups))
    out = pipe("a red heart", groups=[group], k=3, steps=2, seed=0)
    assert {n.item.group for n in out.neighbours[0]} == {group}


def test_saved_and_loaded_gives_the_same_images(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    again = KNNDiffusion.from_pretrained(tmp_path / "model")
    a, b = (pixels(p("pizza", steps=4, seed=2)) for p in (pipe, again))
    np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match="exists already"):
        pipe.save_pretrained(tmp_path / "model")


def with_animals_alone(pipe):
    """The model with its smaller database, quick to save."""
    animals = {"animals": pipe.databases["animals"]}
    return KNNDiffusion(pipe.encoder, pipe.tokenizer, pipe.denoiser, animals)


def test_the_current_database_is_saved_as_the_default(pipe, tmp_path):
    animals = pipe.databases["animals"]
    few = Database.merge([animals])
    few.remove(few.ids[5:])
    model = with_animals_alone(pipe)
    model.database = few
    model.save_pretrained(tmp_path / "own")
    again = KNNDiffusion.from_pretrained(tmp_path / "own")
    assert {name: len(db) for name, db in again.databases.items()} == {
        "database": 5, "animals": len(animals)
    }  # fmt: skip
    assert again.database is again.databases["database"]
    again.database = Database.merge([few, few])
    again.save_pretrained(tmp_path / "twice")
    thrice = KNNDiffusion.from_pretrained(tmp_path / "twice")
    assert [len(db) for db in thrice.databases.values()] == [10, 5, len(animals)]
    thrice.database = "animals"
    thrice.save_pretrained(tmp_path / "named")
    default = KNNDiffusion.from_pretrained(tmp_path / "named").database
    assert len(default) == len(animals)
    thrice.database = {"animals": 0.5, "database": 0.5}
    with pytest.raises(ValueError, match="database: a mix is not saved"):
        thrice.save_pretrained(tmp_path / "mix")
    assert not (tmp_path / "mix").exists()


@pytest.mark.parametrize(
    "change", [{"databases": ["../../db"]}, {"databases": ["/db"]}, {"base": {"folder": ".."}}]
)
def test_a_model_does_not_reach_out_of_its_folder(tmp_path, change):
    shutil.copytree(find_model("stickers"), tmp_path / "model")
    file = tmp_path / "model" / "model.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=r"model\.json.*not a plain file name"):
        databases_of(tmp_path / "model")


def test_a_database_is_not_saved_out_of_its_model(pipe, tmp_path):
    model = with_animals_alone(pipe)
    model.databases["../../animals"] = model.databases["animals"]
    with pytest.raises(ValueError, match=r"databases: '\.\./\.\./animals' cannot be the name"):
        model.save_pretrained(tmp_path / "model")
    assert not any(tmp_path.iterdir())


def test_a_denoiser_is_saved_in_fp16_or_as_it_is(pipe, tmp_path):
    model = with_animals_alone(KNNDiffusion.from_pretrained("stickers"))
    with torch.no_grad():
        model.denoiser.head.weight.add_(1e-6)
    weight = model.denoiser.head.weight
    model.save_pretrained(tmp_path / "half")
    model.save_pretrained(tmp_path / "whole", dtype=torch.float32)
    half, whole = (
        KNNDiffusion.from_pretrained(tmp_path / name).denoiser.head.weight
        for name in ("half", "whole")
    )
    assert torch.equal(whole, weight)
    assert torch.equal(half, weight.half().float())
    assert not torch.equal(half, weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_denoiser_of_half_precision(pipe, dtype):
    half = KNNDiffusion.from_pretrained("stickers", dtype=dtype)
    assert half.denoiser.head.weight.dtype == dtype
    call = {"steps": 2, "num_images": 2, "seed": 3}
    whole, drawn = (pixels(p("a red heart", **call)).astype(float) for p in (pipe, half))
    assert np.abs(whole - drawn).mean() < 4


@pytest.mark.parametrize(
    ("backbone", "dtype"),
    [("discrete", torch.float64), ("discrete", "bf16"), ("continuous", torch.float16)],
)
def test_rejects_dtypes(backbone, dtype):
    with pytest.raises(ValueError, match=f"dtype: must be one of .* {backbone} backbone, got"):
        KNNDiffusion.from_pretrained("stickers", backbone=backbone, dtype=dtype)


def test_weights_are_not_saved_as_what_they_cannot_be(pipe, tmp_path):
    for dtype in (torch.int32, torch.complex64, None):
        with pytest.raises(ValueError, match=r"dtype: must be one of torch.float32, .*, got"):
            pipe.save_pretrained(tmp_path / "model", dtype)
    assert not (tmp_path / "model").exists()


def test_moves_all_of_its_networks(pipe, monkeypatch):
    with pytest.raises(ValueError, match="device: must be cpu, cuda or cuda:N, got 'tpu'"):
        pipe.to("tpu")
    before = pixels(pipe("pizza", steps=2, seed=0))
    assert pipe.to("cpu") is pipe
    np.testing.assert_array_equal(pixels(pipe("pizza", steps=2, seed=0)), before)
    monkeypatch.setattr("knnfast.pipeline.check_torch_device", lambda *_: None)
    gone = KNNDiffusion.from_pretrained("stickers").to("meta")
    networks = (gone.encoder.tower, gone.tokenizer, gone.denoiser)
    assert {p.device.type for net in networks for p in net.parameters()} == {"meta"}
    assert gone.device == gone.encoder.device == torch.device("meta")


def test_a_move_that_fails_is_taken_back(monkeypatch):
    pipe = KNNDiffusion.from_pretrained("stickers")

    def full(device):
        if str(device) == "meta":
            raise torch.OutOfMemoryError("no room")
        return pipe.denoiser

    monkeypatch.setattr("knnfast.pipeline.check_torch_device", lambda *_: None)
    monkeypatch.setattr(pipe.denoiser, "to", full)
    monkeypatch.setattr(pipe.tokenizer, "to", full)
    monkeypatch.setattr(pipe.encoder, "to", lambda device: moves.append(str(device)))
    moves = []
    with pytest.raises(torch.OutOfMemoryError):
        pipe.to("meta")
    assert moves == ["meta", "cpu"]


def test_search_finds_what_a_call_is_conditioned_on(pipe):
    chosen = {"k": 4, "database": {"stickers": 1, "animals": 1}, "where": lambda i: "e" in i.name}
    called = pipe(["a cat", "pizza"], steps=1, seed=0, **chosen).neighbours
    assert pipe.search(["a cat", "pizza"], **chosen) == called
    animals = pipe.databases["animals"]
    (found,) = pipe.search(image=animals.thumbnail(int(animals.ids[5])), database="animals")
    assert (len(found), found[0].item) == (10, animals[int(animals.ids[5])])
    with pytest.raises(ValueError, match="prompt: give a prompt, an image"):
        pipe.search()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_codes": 256}, "denoiser: its num_codes is 256, the tokenizer's 512"),
        ({"grid": (8, 8)}, r"denoiser: its grid is \(8, 8\), the tokenizer's \(16, 16\)"),
        ({"embed_dim": 64}, "denoiser: its embed_dim is 64, the encoder's 512"),
    ],
)
def test_rejects_parts_that_do_not_fit(pipe, sizes, message):
    small = {"width": 32, "depth": 1, "mlp_width": 32, "canvas_layers": ()}
    denoiser = Denoiser(DenoiserConfig(**small, **sizes))
    with pytest.raises(ValueError, match=message):
        KNNDiffusion(pipe.encoder, pipe.tokenizer, denoiser, pipe.databases)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": "  "}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"k": 0}, "k: must be 1"),
        ({"k": 10**6}, "size of the database"),
        ({"steps": 0}, "steps"),
        ({"steps": 10**6}, "steps"),
        ({"steps": 1.5}, r"steps: a whole number or a list of levels, got 1\.5"),
        ({"steps": [100, 0.5]}, "steps: a whole number or a list"),
        ({"guidance": None}, "guidance: expected a number"),
        ({"truncation": "a"}, "truncation: expected a number"),
        ({"purity": "a"}, "purity: expected a number"),
        ({"purity": -1}, "purity must be finite and at least 0"),
        ({"database": 3}, "database: expected a Database, a name"),
        ({"database": {"animals": "x"}}, "database: a weight: expected a number, got 'x'"),
        ({"image": Image.new("RGB", (0, 5))}, r"image: has no pixels, its size is \(0, 5\)"),
        ({"num_images": 0}, "num_images"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"truncation": 0.0}, "truncation"),
        ({"guidance": float("nan")}, "guidance"),
        ({"solver": "ddim"}, "solver: the discrete backbone has none"),
        ({"steps": [100, 50, 50, 0]}, "steps must fall"),
        ({"image_weight": 2.0}, "image_weight"),
        ({"image_weight": 0.3}, "image_weight: shares a query of prompt and image; give both"),
        ({"database": {"stickers": 1e-6, "animals": 1.0}, "k": 400}, "neighbours are asked of"),
        ({"database": "nowhere"}, "database"),
        ({"groups": ["nowhere"]}, "groups"),
        ({"groups": 3}, "groups: expected names, got 3"),
        ({"where": 5}, "where: expected a function of an image, got 5"),
        ({"use_query": "no"}, "use_query: expected True or False, got 'no'"),
        ({"image": np.zeros((4, 4, 3))}, "image: expected one, or a list of them, got ndarray"),
        ({"prompt": 3}, "prompt: expected one, or a list of them, got int"),
    ],
)
def test_rejects_before_anything_is_computed(pipe, arguments, message, monkeypatch):
    monkeypatch.setattr("knnfast.pipeline.embed", None)
    with pytest.raises((ValueError, TypeError), match=message):
        pipe(**{"prompt": "pizza", **arguments})


def test_rejects_another_encoders_database(pipe, tmp_path):
    class Other:
        card = type(pipe.encoder.card)(name="other", dim=4, sha256="ab" * 32, image_size=8)

    with pytest.raises(ValueError, match="'other'"):
        pipe.database = Database(Other.card)


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("tpu", "device: must be cpu, cuda or cuda:N, got 'tpu'"),
        ("cuda:99", "device: must be cpu.*, torch finds . CUDA devices here, got 'cuda:99'"),
    ],
)
def test_rejects_devices(device, message):
    with pytest.raises(ValueError, match=message):
        KNNDiffusion.from_pretrained("stickers", device=device)


def test_rejects_what_is_no_name():
    with pytest.raises(TypeError, match="name_or_path: expected a name or a folder, got None"):
        KNNDiffusion.from_pretrained(None)


def read_all(model):
    for database in KNNDiffusion.from_pretrained(model).databases.values():
        database.index.verify()
        for id in database.ids.tolist():
            database.thumbnail(id)


def test_every_damaged_file_is_named(tmp_path):
    whole = find_model("stickers")
    for path in sorted(p for p in whole.rglob("*") if p.is_file() and p.name != "README.md"):
        name = path.relative_to(whole)
        copy = tmp_path / "copy"
        shutil.copytree(whole, copy)
        (copy / name).unlink()
        with pytest.raises((OSError, ValueError), match=path.name):
            KNNDiffusion.from_pretrained(copy)
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 0x55
        (copy / name).write_bytes(data)
        # A flipped bit of a manifest may still be JSON.
        if path.name not in ("model.json", "database.json", "manifest.json"):
            with pytest.raises(ValueError, match=path.name):
                read_all(copy)
        shutil.rmtree(copy)


def test_contact_sheet_shows_every_sample(pipe):
    out = pipe(["pizza", "rocket"], num_images=3, steps=2, seed=0)
    sheet = contact_sheet(out, pipe.database)
    assert isinstance(sheet, Image.Image)
    assert np.asarray(sheet).std() > 10


def test_a_contact_sheet_spells_letters_that_its_font_lacks(pipe):
    out = pipe("pizza", k=1, steps=1, seed=0)
    (near,) = out.neighbours[0]
    sheets = []
    for name in ("pi\u00f1ata", "pinata"):
        row = [replace(near, item=replace(near.item, name=name))]
        named = replace(out, labels=[name], neighbours=[row])
        sheets.append(contact_sheet(named, pipe.database).tobytes())
    assert sheets[0] == sheets[1]


@pytest.mark.gpu
def test_cuda_draws_and_edits():
    """Later calls are replays of a graph, with the images of the loop; then one edit."""
    pipe = KNNDiffusion.from_pretrained("stickers-edit", device="cuda")
    call = {"steps": 4, "num_images": 3, "seed": 7}
    loop = pixels(pipe("a red heart", callback=lambda *_: None, **call))
    for _ in range(3):
        np.testing.assert_array_equal(pixels(pipe("a red heart", **call)), loop)
    assert (pixels(pipe("a red heart", **call | {"seed": 8})) != loop).any()
    assert (pixels(pipe("pizza", **call)) != loop).any()
    moved = KNNDiffusion.from_pretrained("stickers-edit").to("cuda")
    moved.database.to("cuda")
    np.testing.assert_array_equal(pixels(moved("a red heart", **call)), loop)
    out = pipe.edit(Image.fromarray(loop[0]), "with sunglasses", num_images=2, steps=4, seed=1)
    assert len(out.images) == 2
    assert out.images[0].size == (pipe.tokenizer.image_size, pipe.tokenizer.image_size)
