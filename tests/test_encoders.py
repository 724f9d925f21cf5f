"""Encoders: cards, folders and their damage, the word table, the two halves, open_clip."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from knnfast.encoders import (
    EncoderCard,
    ImageTower,
    WordTable,
    image_tower,
    load_encoder,
    openclip,
    pixels,
    save_encoder,
    small,
    words_of,
)
from knnfast.images import read_image
from knnfast.query import embed, mix

WORDS = ["cat", "dog", "fire", "truck", "elephant", "giraffe", "heart", "red"]
TOWER = {
    "image_size": 32,
    "semantic_dim": 16,
    "appearance_dim": 8,
    "thumbnail": 4,
    "semantic_share": 0.6,
    "vit": {"width": 16, "depth": 1, "heads": 2},
}


def toy_table(bits=8):
    vectors = np.random.default_rng(0).normal(size=(len(WORDS), 16)).astype(np.float32)
    return WordTable.quantise(WORDS, vectors, bits)


def toy_tower(config=TOWER):
    torch.manual_seed(0)
    tower = ImageTower(config)
    if tower.appearance_dim:
        tower.appearance_basis.normal_()
        tower.appearance_mean.fill_(0.5)
    return tower


@pytest.fixture
def folder(tmp_path):
    save_encoder(tmp_path / "toy", "toy", {"tower": TOWER}, toy_tower(), toy_table(), {"by": "me"})
    return tmp_path / "toy"


def pictures(n, size=(32, 32)):
    rng = np.random.default_rng(1)
    return [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for _ in range(n)]


# -- cards and folders


def test_card_round_trip():
    card = EncoderCard("toy", 24, "ab" * 32, 32)
    assert EncoderCard.from_dict(json.loads(json.dumps(card.to_dict()))) == card


@pytest.mark.parametrize("values", [{}, {"name": "x"}, {"name": "x", "dim": "many"}, 3])
def test_card_rejects(values):
    with pytest.raises(ValueError, match="not an encoder card"):
        EncoderCard.from_dict(values)


def test_folder_round_trip(folder, tmp_path):
    encoder = load_encoder(folder)
    assert encoder.card.name == "toy"
    assert (encoder.dim, encoder.card.image_size) == (24, 32)
    assert encoder.save(tmp_path / "copy") is None
    again = load_encoder(str(tmp_path / "copy"))
    assert again.card == encoder.card
    images = pictures(3)
    np.testing.assert_array_equal(
        again.encode_images(images).vectors, encoder.encode_images(images).vectors
    )


def test_hash_depends_on_weights_words_and_architecture(tmp_path):
    def sha(tower=TOWER, words=WORDS, change=0.0):
        network = toy_tower(tower)
        with torch.no_grad():
            network.head.bias[0] += change
        table = toy_table()
        table.words = list(words)
        return save_encoder(tmp_path / "x", "x", {"tower": tower}, network, table, {}).sha256

    assert sha() == sha()
    others = {sha(change=0.5), sha(words=WORDS[::-1]), sha({**TOWER, "semantic_share": 0.7})}
    assert len(others | {sha()}) == 4


def test_notes_are_not_hashed(tmp_path):
    def sha(notes):
        return save_encoder(tmp_path / "x", "x", {"tower": TOWER}, toy_tower(), None, notes).sha256

    assert sha({}) == sha({"quality": 1})


def test_notes_can_be_replaced(folder):
    encoder = load_encoder(folder)
    encoder.describe({"quality": 0.9})
    again = load_encoder(folder)
    assert again.config["notes"] == {"quality": 0.9}
    assert again.card == encoder.card


def test_weights_are_stored_to_half_a_step(folder):
    """Matrices keep 8 bits a row: no value is off by more than half a step of its row."""
    loaded = load_encoder(folder).tower.state_dict()
    for key, value in toy_tower().state_dict().items():
        if value.ndim < 2:
            torch.testing.assert_close(loaded[key], value.half().float(), atol=0, rtol=0)
            continue
        step = value.flatten(1).abs().amax(1) / 127
        # The FP16 scale may be off by 2^-11, which 127 steps feel.
        worst = (loaded[key] - value).flatten(1).abs().amax(1)
        assert (worst <= step * (0.5 + 127 / 2048) + 1e-6).all(), key


def flip_a_weight(folder):
    path = folder / small.WEIGHTS_FILE
    data = bytearray(path.read_bytes())
    data[-5] ^= 0x40
    path.write_bytes(bytes(data))


def truncate(folder):
    path = folder / small.WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:-100])


def edit_config(**changes):
    def change(folder):
        path = folder / small.CONFIG_FILE
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (flip_a_weight, "hash"),
        (truncate, "safetensors|incomplete|Invalid|Metadata|header"),
        (lambda f: (f / small.WEIGHTS_FILE).unlink(), "No such file"),
        (lambda f: (f / small.CONFIG_FILE).unlink(), "no such file"),
        (lambda f: (f / small.CONFIG_FILE).write_text("{"), "not valid JSON"),
        (lambda f: (f / small.CONFIG_FILE).write_text("[]"), "JSON object"),
        (lambda f: (f / small.WORDS_FILE).write_text("cat\n"), "1 words, expected 8"),
        (
            lambda f: (f / small.WORDS_FILE).write_text("\n".join(WORDS[::-1])),
            "hash",
        ),
        (edit_config(format="other"), "format is 'other'"),
        (edit_config(tower={**TOWER, "semantic_share": 0.9}), "hash"),
        (edit_config(tower=None), "hash"),
    ],
)
def test_damaged_folder_is_refused(folder, damage, reason):
    damage(folder)
    with pytest.raises(ValueError, match=reason) as caught:
        load_encoder(folder)
    assert str(folder) in str(caught.value)


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no encoder folder"):
        load_encoder(tmp_path / "nowhere")


# -- pictures


def test_pixels_keep_the_shape_on_white():
    wide = Image.new("RGB", (40, 20), (255, 0, 0))
    square = pixels([wide], 32)[0]
    assert (square[:8] == 255).all()
    assert (square[24:] == 255).all()
    assert (square[8:24] == (255, 0, 0)).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "L", "P", "1", "CMYK"])
def test_pixels_read_every_mode(mode):
    image = Image.new("RGB", (32, 32), (255, 255, 255)).convert(mode)
    assert (pixels([image], 32) == 255).all()


def test_transparent_is_white():
    assert (pixels([Image.new("RGBA", (32, 32), (0, 0, 0, 0))], 32) == 255).all()


def odd_files(folder):
    """Files whose pixels are not what is to be seen: turned, of 16 bits, with hidden colours."""
    rng = np.random.default_rng(2)
    turned = Image.Exif()
    turned[0x0112] = 6  # a quarter to the right
    colours = Image.fromarray(rng.integers(0, 256, (20, 32, 3), dtype=np.uint8))
    colours.save(folder / "turned.png", exif=turned)
    grey = rng.integers(0, 2**16, (32, 32), dtype=np.uint16)
    Image.fromarray(grey).save(folder / "deep.png")
    hidden = rng.integers(0, 256, (32, 32, 4), dtype=np.uint8)
    hidden[:16, :, 3] = 0
    Image.fromarray(hidden).save(folder / "hidden.png")
    return sorted(folder.glob("*.png"))


def test_an_open_picture_is_seen_as_its_file(folder, tmp_path):
    encoder = load_encoder(folder)
    files = odd_files(tmp_path)
    assert len(files) == 3
    for file in files:
        with Image.open(file) as opened:
            np.testing.assert_array_equal(pixels([opened], 32), pixels([read_image(file)], 32))
            rows = embed([mix((opened, 1.0)), mix((file, 1.0))], encoder).vectors
            np.testing.assert_array_equal(rows[0], rows[1])


def test_images_are_unit_rows_at_any_batch_size(folder):
    encoder = load_encoder(folder)
    images = pictures(7)
    rows = encoder.encode_images(images).vectors
    assert rows.dtype == np.float32
    assert rows.shape == (7, 24)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    for batch_size in (1, 3, 100):
        other = encoder.encode_images(images, batch_size=batch_size).vectors
        np.testing.assert_allclose(rows, other, atol=1e-5)
    assert encoder.encode_images([]).vectors.shape == (0, 24)


def test_image_rejects(folder):
    encoder = load_encoder(folder)
    with pytest.raises(ValueError, match="batch_size"):
        encoder.encode_images(pictures(1), batch_size=0)
    with pytest.raises(TypeError, match="PIL images, got ndarray"):
        encoder.encode_images([np.zeros((4, 4, 3), np.uint8)])


def test_the_two_halves(folder):
    """An image fills both halves by their shares; a text fills the semantic one alone."""
    encoder = load_encoder(folder)
    image = encoder.encode_images(pictures(5)).vectors
    text = encoder.encode_text(["red heart", "dog"]).vectors
    np.testing.assert_allclose((image[:, :16] ** 2).sum(1), 0.6, atol=1e-5)
    np.testing.assert_allclose((image[:, 16:] ** 2).sum(1), 0.4, atol=1e-5)
    assert (text[:, 16:] == 0).all()
    semantic = image[:, :16] / np.linalg.norm(image[:, :16], axis=1, keepdims=True)
    np.testing.assert_allclose(text @ image.T, 0.6**0.5 * (text[:, :16] @ semantic.T), atol=1e-5)


def test_appearance_is_linear_in_the_thumbnail():
    tower = toy_tower().double()
    images = torch.rand(4, 3, 32, 32, dtype=torch.float64)
    small = images.reshape(4, 3, 4, 8, 4, 8).mean((3, 5)).reshape(4, -1)
    expected = (small - 0.5) @ tower.appearance_basis.T
    expected /= expected.norm(dim=1, keepdim=True)
    torch.testing.assert_close(tower.appearance(images), expected)


def test_vit_attention_is_softmax_attention():
    block = image_tower.Block(16, 2).double()
    x = torch.randn(3, 5, 16, dtype=torch.float64)
    q, k, v = block.qkv(block.norm1(x)).view(3, 5, 3, 2, 8).permute(2, 0, 3, 1, 4)
    fused = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    y = x + block.out(fused.transpose(1, 2).reshape(3, 5, 16))
    y = y + block.down(torch.nn.functional.gelu(block.up(block.norm2(y))))
    torch.testing.assert_close(block(x), y)


def test_images_alone(tmp_path):
    config = {"image_size": 32, "semantic_dim": 16, "resnet": {"widths": [8, 16]}}
    save_encoder(tmp_path, "eyes", {"tower": config}, toy_tower(config), None, {})
    encoder = load_encoder(tmp_path)
    assert encoder.encode_images(pictures(2)).vectors.shape == (2, 16)
    with pytest.raises(ValueError, match="eyes has no text side"):
        encoder.encode_text(["cat"])


# -- words


def test_words_of():
    assert words_of("Crème Brûlée, 2nd woman’s hat!") == ["creme", "brulee", "2nd", "womans", "hat"]
    assert words_of("日本 ❤") == []


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_vectors(bits):
    """The error stays below that of rounding to the peak's grid; whole steps come back exactly."""
    rng = np.random.default_rng(3)
    vectors = rng.normal(size=(20, 16)).astype(np.float32)
    words = [f"w{i}" for i in range(20)]
    table = WordTable.quantise(words, vectors, bits)
    assert table.dim == 16
    assert table.codes.nbytes == 20 * 16 * bits // 8
    top = {4: 7, 8: 127}[bits]
    step = np.abs(vectors).max(1, keepdims=True) / top
    naive = ((np.rint(vectors / step) * step - vectors) ** 2).sum(1)
    error = ((table.vectors(range(20)) - vectors) ** 2).sum(1)
    assert (error <= naive * 1.1 + 1e-6).all()
    whole = rng.integers(-top, top + 1, (20, 16)).astype(np.float32)
    whole[:, 0] = top
    assert (WordTable.quantise(words, whole * 0.25, bits).vectors(range(20)) == whole * 0.25).all()


def test_text_is_the_normalised_sum_of_its_words():
    table = toy_table()
    expected = table.vectors([7, 6]).sum(0)
    expected /= np.linalg.norm(expected)
    np.testing.assert_allclose(table.encode(["Red  HEART!"])[0], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("unknown", "rows"),
    [("elefant", {"elephant"}), ("girafe", {"giraffe"}), ("firetruck", {"fire", "truck"})],
)
def test_unknown_words_land_near_their_letters(unknown, rows):
    table = toy_table()
    found = {table.words[row]: cosine for row, cosine in table.similar(unknown)}
    best = sorted(found, key=found.get, reverse=True)[: len(rows)]
    assert set(best) == rows
    assert all(0.25 <= cosine <= 1 for cosine in found.values())


def test_a_vocabulary_of_one_word():
    table = WordTable.quantise(["cat"], np.ones((1, 4), np.float32), 8)
    assert table.similar("cats")[0][0] == 0
    assert table.similar("zzz") == []


def test_an_unknown_word_weighs_less_than_a_known_one():
    table = toy_table()
    assert 0 < sum(weight for _, weight in table.parts("elephand")) < 1
    assert table.parts("elephant") == [(4, 1.0)]


def test_one_sound_spelled_two_ways_is_one_word():
    table = toy_table()
    for spelled, word in (("elefant", "elephant"), ("jyrafe", "giraffe"), ("truk", "truck")):
        best, cosine = table.similar(spelled)[0]
        assert table.words[best] == word
        assert (cosine > 0.99) == (spelled != "jyrafe")


@pytest.mark.parametrize("text", ["", "   ", "???", "日本", "qqqq"])
def test_unreadable_text_is_refused(folder, text):
    with pytest.raises(ValueError, match=r"text 1 .* holds no word"):
        load_encoder(folder).encode_text(["cat", text])


def test_all_unreadable_texts_are_named(folder):
    with pytest.raises(
        ValueError, match=r"text 0 \('日本'\), text 2 \('qqqq'\) \(2 of 3\) hold no"
    ):
        load_encoder(folder).encode_text(["日本", "cat", "qqqq"])


def test_one_string_is_refused(folder):
    with pytest.raises(TypeError, match="got one string"):
        load_encoder(folder).encode_text("cat")


def test_table_rejects():
    with pytest.raises(ValueError, match="twice"):
        WordTable(["a", "a"], np.zeros((2, 4), np.int8), np.ones(2, np.float16))
    with pytest.raises(ValueError, match="3 words, 2 codes"):
        WordTable(["a", "b", "c"], np.zeros((2, 4), np.int8), np.ones(2, np.float16))


def test_nothing_heavy_is_imported(folder):
    code = (
        "import sys; from knnfast.encoders import load_encoder; "
        f"load_encoder({str(folder)!r}).encode_text(['cat']); "
        "heavy = {'transformers', 'torchvision', 'open_clip', 'diffusers'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# -- open_clip


@pytest.mark.filterwarnings("ignore")
def test_open_clip_local_folder(open_clip_folder, tmp_path, monkeypatch):
    folder, network = open_clip_folder
    encoder = load_encoder(f"open_clip:local-dir:{folder}")
    assert (encoder.dim, encoder.card.image_size) == (32, 32)
    rows = encoder.encode_images(pictures(3, (40, 50)), batch_size=2).vectors
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    texts = encoder.encode_text(["a cat", "a dog"]).vectors
    tokens = openclip.import_open_clip().tokenize(["a cat", "a dog"], context_length=16)
    with torch.no_grad():
        expected = network.encode_text(tokens, normalize=True)
    np.testing.assert_allclose(texts, expected.numpy(), atol=1e-5)
    again = load_encoder(f"open_clip:local-dir:{folder}")
    assert again.card == encoder.card
    assert encoder.save(folder / "unused") == f"open_clip:local-dir:{folder}"
    with pytest.raises(ValueError, match="text 0 is empty"):
        encoder.encode_text([" "])
    for file in odd_files(tmp_path):
        with Image.open(file) as opened:
            rows = encoder.encode_images([opened, read_image(file)]).vectors
        np.testing.assert_array_equal(rows[0], rows[1])
    monkeypatch.chdir(folder.parent)
    relative = load_encoder(f"open_clip:local-dir:{folder.name}")
    assert relative.save(tmp_path) == f"open_clip:local-dir:{folder.resolve()}"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("spec", "kind", "reason"),
    [
        ("open_clip:", ValueError, "should read open_clip:MODEL/PRETRAINED"),
        ("open_clip:ViT-B-32", ValueError, "should read open_clip:MODEL/PRETRAINED"),
        ("open_clip:ViT-B-32/none_such", ValueError, "no weights 'none_such'"),
        ("open_clip:local-dir:/none/such", FileNotFoundError, "no open_clip folder"),
    ],
)
def test_open_clip_rejects(open_clip_folder, spec, kind, reason):
    with pytest.raises(kind, match=reason):
        load_encoder(spec)


@pytest.mark.filterwarnings("ignore")
def test_open_clip_damaged_weights(open_clip_folder, tmp_path):
    (tmp_path / "open_clip_config.json").write_bytes(
        (open_clip_folder[0] / "open_clip_config.json").read_bytes()
    )
    (tmp_path / "open_clip_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(OSError, match="cannot be loaded"):
        load_encoder(f"open_clip:local-dir:{tmp_path}")


def test_open_clip_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ImportError, match=r"pip install '\.\[clip\]'"):
        load_encoder("open_clip:ViT-B-32/laion2b_s34b_b79k")
