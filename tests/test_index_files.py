"""An index in files: what is saved comes back; what is damaged is refused; a kill does no harm."""

import ctypes
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import compiled

from knnfast.search import DamagedFile, Index


def make(path, seed=0, own=False):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((300, 24)).astype(np.float32)
    index = Index(24, "cosine")
    ids = index.add(x, rng.permutation(9000)[:300] if own else None)
    index.remove(ids[:3])
    index.save(path)
    return index, x


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("mmap", [False, True])
def test_round_trip(tmp_path, mmap, own):
    index, x = make(tmp_path / "ix", own=own)
    opened = Index.open(tmp_path / "ix", mmap=mmap)
    opened.verify()
    assert (opened.metric, opened.scan, len(opened)) == ("cosine", "auto", 297)
    for a, b in zip(index.search(x, 9), opened.search(x, 9), strict=True):
        np.testing.assert_array_equal(a, b)
    assert opened.add(x[:1]) == index.add(x[:1])
    opened.save(tmp_path / "ix")  # over the files it is mapped from
    again = Index.open(tmp_path / "ix")
    again.verify()
    again.save(tmp_path / "twice")
    other = Index.open(tmp_path / "twice")
    again.save(tmp_path / "twice")
    with pytest.raises(FileNotFoundError, match="was saved anew since it was opened"):
        other.verify()
    for a, b in zip(opened.search(x, 9), again.search(x, 9), strict=True):
        np.testing.assert_array_equal(a, b)
    rows = next((tmp_path / "ix").glob("*-0000.rows.f16"))
    assert np.fromfile(rows, np.float16).reshape(-1, 24).shape == (300, 24)
    assert json.loads((tmp_path / "ix" / "manifest.json").read_text())["index"]["dim"] == 24


def crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ 0x82F63B78 * (crc & 1)
    return crc ^ 0xFFFFFFFF


def reseal(folder, index):
    """A manifest of what `index` says."""
    text = json.dumps(index)
    sealed = f'{{"crc32c":{crc32c(text.encode())},"index":{text}}}\n'
    (folder / "manifest.json").write_text(sealed)


def test_a_newer_version(tmp_path):
    make(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())["index"]
    reseal(tmp_path, manifest | {"version": 99})
    with pytest.raises(DamagedFile, match=r"newer knnfast: format 99, this one reads 1 to \d"):
        Index.open(tmp_path)


@pytest.mark.parametrize("version", [1, 2, 3])
def test_older_versions(tmp_path, version):
    """What their bounds say of the places where a scan may stop is not taken for today's."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((8, 128))[rng.integers(0, 8, 320)]
    x = (x + rng.standard_normal((320, 128)) / 4).astype(np.float32)
    index = Index(128)
    index.add(x)
    index.save(tmp_path)
    (terms,) = tmp_path.glob("*.terms.f32")
    words = np.fromfile(terms, np.uint32)
    if version < 3:
        words[320 + 128 + 320 :][:320] &= 0xFFFF0000  # bounds that stop every row
    words.tofile(terms)
    manifest = json.loads((tmp_path / "manifest.json").read_text())["index"]
    manifest["version"] = version
    manifest["segments"][0]["terms"]["crc32c"] = crc32c(words.tobytes())
    reseal(tmp_path, manifest)
    opened = Index.open(tmp_path)
    opened.verify()
    for m in (1, 20):
        for a, b in zip(index.search(x[:m], 9), opened.search(x[:m], 9), strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_rotation_is_checked(tmp_path):
    """A file of a rotation is refused when it was damaged, and when it says that it is none."""
    rng = np.random.default_rng(0)
    index = Index(256)
    index.add((rng.standard_normal((16_384, 5)) @ rng.standard_normal((5, 256))).astype(np.float16))
    index.save(tmp_path)
    (path,) = tmp_path.glob("*.rotation.f32")
    rotation = np.fromfile(path, np.float32)
    manifest = json.loads((tmp_path / "manifest.json").read_text())["index"]
    entry = manifest["segments"][0]["rotation"]

    def write(matrix, sealed):
        matrix.astype(np.float32).tofile(path)
        if sealed:
            entry["crc32c"] = crc32c(path.read_bytes())
            reseal(tmp_path, manifest)

    write(rotation * 1.00001, sealed=False)
    with pytest.raises(DamagedFile, match=r"rotation\.f32.*checksum"):
        Index.open(tmp_path)
    for error in (1, 0, -1e-7, np.nan):  # how far it is from orthogonal
        write(np.append(rotation[:-1], error), sealed=True)
        with pytest.raises(DamagedFile, match=r"rotation\.f32.*no rotation"):
            Index.open(tmp_path)
    for wrong in (0, 1.1, np.inf, np.nan):
        matrix = rotation.copy()
        matrix[256:512] *= wrong
        write(matrix, sealed=True)
        with pytest.raises(DamagedFile, match=r"rotation\.f32.*no rotation"):
            Index.open(tmp_path)
    reseal(tmp_path, manifest | {"version": 3})
    with pytest.raises(DamagedFile, match="a rotation out of place"):
        Index.open(tmp_path)
    write(rotation, sealed=True)
    Index.open(tmp_path).verify()
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"rotation\.f32"):
        Index.open(tmp_path)
    os.mkfifo(path)
    with pytest.raises(DamagedFile, match=r"rotation\.f32.*not a regular file"):
        Index.open(tmp_path)


def mutate(data, rng):
    data = bytearray(data)
    kind = rng.randrange(4)
    if kind == 0 and data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del data[rng.randrange(len(data) + 1) :]
    elif kind == 2:
        data += bytes(rng.randrange(1, 200))
    else:
        at = rng.randrange(len(data))
        data[at : at + 8] = rng.choice([b"\xff" * 8, b"99999999", b"-1111111", b"\x00" * 8])
    return bytes(data)


def mutate_manifest(index, rng):
    """One entry of a manifest changed in place: another number, another kind, or gone."""
    places = []

    def walk(part):
        for key in part if isinstance(part, dict) else range(len(part)):
            places.append((part, key))
            if isinstance(part[key], dict | list):
                walk(part[key])

    walk(index)
    part, key = rng.choice(places)
    kind = rng.randrange(4)
    if kind == 0:
        del part[key]
    elif kind == 1 and isinstance(part[key], int):
        part[key] += rng.choice([1, -1, 2**31, 2**62])
    elif kind == 2 and isinstance(part, list):
        part.append(part[key])
    else:
        values = [0, -1, 1, 2**31 - 1, 2**63 - 1, 2**63, 2**64, 1e300, "", "../x", None, [], {}]
        part[key] = rng.choice(values)


def make_several(folder):
    """An index with every kind of file: own ids, removed rows, a rotation, two segments."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((16_400, 4)) @ rng.standard_normal((4, 125))
    index = Index(125)
    index.add(x[:16_390].astype(np.float16), rng.permutation(40_000)[:16_390])
    index.save(folder)
    index = Index.open(folder)
    ids = index.add(x[16_390:].astype(np.float16))
    index.remove(ids[:3])
    index.save(folder)
    kinds = {path.name.partition(".")[2] for path in folder.iterdir()}
    assert kinds >= {"rotation.f32", "ids.i64", "live.u16"}, kinds
    return x.astype(np.float32)


@pytest.mark.parametrize("several", [False, True])
def test_mutations(tmp_path, several):
    """Each damaged file is refused, or `verify` names it; nothing crashes."""
    folder = tmp_path / "ix"
    x = make_several(folder) if several else make(folder)[1]
    rng = random.Random(0)
    names = sorted(p.name for p in folder.iterdir())
    for _ in range(int(os.environ.get("KNNFAST_MUTATIONS", "400")) // (8 if several else 1)):
        name = rng.choice(names)
        whole = (folder / name).read_bytes()
        damaged = mutate(whole, rng)
        if damaged == whole:
            continue
        (folder / name).write_bytes(damaged)
        try:
            opened = Index.open(folder, mmap=rng.random() < 0.5)
            opened.search(x[:2], 5)
            with pytest.raises(DamagedFile, match=name):
                opened.verify()
        except DamagedFile as error:
            assert name in str(error)  # noqa: PT017
        finally:
            (folder / name).write_bytes(whole)
    Index.open(folder).verify()


@pytest.mark.parametrize("several", [False, True])
def test_mutated_manifests(tmp_path, several):
    """Those whose checksum is right: refused, or an index whose files verify; nothing crashes."""
    folder = tmp_path / "ix"
    x = make_several(folder) if several else make(folder, own=True)[1]
    rng = random.Random(1)
    whole = (folder / "manifest.json").read_text()
    refused = 0
    for _ in range(int(os.environ.get("KNNFAST_MUTATIONS", "400")) // (8 if several else 1)):
        index = json.loads(whole)["index"]
        mutate_manifest(index, rng)
        reseal(folder, index)
        try:
            opened = Index.open(folder, mmap=rng.random() < 0.5)
            opened.verify()
            opened.search(x[:2], 5)
        except (DamagedFile, FileNotFoundError) as error:
            assert str(folder) in str(error)  # noqa: PT017
            refused += 1
    assert refused > 30
    (folder / "manifest.json").write_text(whole)
    Index.open(folder).verify()


@pytest.mark.parametrize("mmap", [False, True])
def test_the_damaged_file_is_blamed(tmp_path, mmap):
    """Ids that cannot be, in a mapped file: not the manifest is named, which is in order."""
    make(tmp_path, own=True)
    (path,) = tmp_path.glob("*.ids.i64")
    ids = np.fromfile(path, np.int64)
    for at, value in ((5, -7), (6, 2**40), (7, ids[9])):
        wrong = ids.copy()
        wrong[at] = value
        wrong.tofile(path)
        with pytest.raises(DamagedFile, match=r"ids\.i64.*checksum"):
            Index.open(tmp_path, mmap=mmap)
    ids.tofile(path)
    Index.open(tmp_path, mmap=mmap).verify()


def test_verify_from_another_folder(tmp_path, monkeypatch):
    """A relative path is that of the moment."""
    monkeypatch.chdir(tmp_path)
    make("ix")
    opened = Index.open("ix")
    made, _ = make("other")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    opened.verify()
    made.verify()
    (rows,) = (tmp_path / "ix").glob("*.rows.f16")
    rows.unlink()
    with pytest.raises(DamagedFile, match=rows.name):
        opened.verify()


def test_paths_that_are_no_utf_8(tmp_path):
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/ix-\xff")
    index, x = make(folder)
    opened = Index.open(folder)
    opened.verify()
    np.testing.assert_array_equal(opened.search(x, 3)[1], index.search(x, 3)[1])
    for rows in Path(folder).glob("*.rows.f16"):
        rows.write_bytes(b"short")
    with pytest.raises(DamagedFile) as caught:
        opened.verify()
    assert folder in str(caught.value)
    with pytest.raises(DamagedFile) as caught:
        Index.open(folder)
    assert folder in str(caught.value)
    with pytest.raises(OSError, match="cannot make") as caught:
        index.save(folder + "/not/there")
    assert folder in str(caught.value)


@pytest.mark.no_asan
def test_kill_during_save(tmp_path):
    """The folder holds the old index or the new one, whenever the process dies."""
    folder = tmp_path / "ix"
    base = Index(64)
    base.add(np.zeros((1, 64), np.float32))
    base.save(folder)
    code = (
        "import sys, numpy as np\n"
        "from knnfast.search import Index\n"
        "ix = Index(64); x = np.ones((4000, 64), np.float32)\n"
        "print(flush=True)\n"
        "for i in range(10**9):\n"
        "    ix.add(x) if len(ix) < 40000 else None\n"
        f"    ix.save({str(folder)!r})\n"
    )
    rng = random.Random(1)
    for _ in range(int(os.environ.get("KNNFAST_KILLS", "8"))):
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        child.stdout.readline()
        time.sleep(rng.random() * 0.2)
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        opened = Index.open(folder)
        opened.verify()
        assert len(opened) == 1 or len(opened) % 4000 == 0
    base.save(folder)
    assert len(list(folder.iterdir())) == 3  # manifest, rows, terms... of one generation
    Index.open(folder).verify()


def test_processes_that_save_to_one_folder_take_turns(tmp_path):
    folder = tmp_path / "ix"
    code = (
        "import numpy as np\n"
        "from knnfast.search import Index\n"
        "ix = Index(64); ix.add(np.ones((2000, 64), np.float32))\n"
        f"for _ in range(10): ix.save({str(folder)!r})\n"
    )
    children = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
    assert [child.wait() for child in children] == [0, 0, 0]
    Index.open(folder).verify()
    assert len(list(folder.iterdir())) == 4  # one generation


@pytest.mark.parametrize(
    ("rows", "scan", "size"),
    [(90, "auto", 1000), (20, "auto", 1000), (1, "fp16", 100)],
    ids=["rows", "codes", "manifest"],  # the file that does not fit
)
def test_a_full_disk_leaves_nothing_behind(tmp_path, full_disk, rows, scan, size):
    index = Index(24, scan=scan)
    index.add(np.ones((rows, 24), np.float32))
    with full_disk(size), pytest.raises(OSError, match=r"cannot write .*large"):
        index.save(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []
    index.save(tmp_path / "old")
    before = {p.name: p.read_bytes() for p in (tmp_path / "old").iterdir()}
    for _ in range(3):
        with full_disk(size), pytest.raises(OSError, match=r"cannot write .*large"):
            index.save(tmp_path / "old")
    assert {p.name: p.read_bytes() for p in (tmp_path / "old").iterdir()} == before
    Index.open(tmp_path / "old").verify()


def test_saving_leaves_files_that_are_not_its_own(tmp_path):
    index, _ = make(tmp_path)
    kept = [
        "notes.txt",
        "manifest.json.bak",
        "0123456789abcdef.txt",
        "manifest.json.0123456789abcdef0",
    ]
    dropped = ["0123456789abcdef-0000.rows.f16", "manifest.json.0123456789abcdef"]
    for name in kept + dropped:
        (tmp_path / name).write_text("")
    index.save(tmp_path)
    names = {p.name for p in tmp_path.iterdir()}
    assert names >= {*kept}
    assert not names & {*dropped}


def test_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="no index"):
        Index.open(tmp_path)


CHECKSUMS = """
#include "common/file.cpp"
extern "C" unsigned by_tables(const unsigned char* p, size_t bytes) {
  return ~knnfast::crc_by_tables(p, bytes, ~0u);
}
extern "C" unsigned either(const unsigned char* p, size_t bytes) {
  return knnfast::crc32c(p, bytes);
}
"""


@pytest.mark.no_asan
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_checksums_by_tables_and_by_instruction(tmp_path):
    """A processor has one of the two."""
    root = Path(__file__).parent.parent
    options = ("-std=c++17", f"-I{root / 'csrc'}", f"-I{root / 'include'}")
    built = ctypes.CDLL(compiled("c++", CHECKSUMS, tmp_path / "crc.so", ".cpp", *options))
    for n in (0, 1, 7, 8, 9, 15, 16, 100, 1001):
        data = np.random.default_rng(n).bytes(n)
        for function in (built.by_tables, built.either):
            function.restype = ctypes.c_uint
            assert function(data, ctypes.c_size_t(n)) == crc32c(data)
    assert built.either(b"123456789", ctypes.c_size_t(9)) == 0xE3069283
