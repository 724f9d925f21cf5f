"""The package as a user gets it: light to import, whole as a wheel, away from the repository."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(code, cwd, **env):
    """Run Python code in a fresh process; returns what it printed as JSON."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_import_loads_nothing_heavy(tmp_path):
    code = "import sys, json, knnfast; print(json.dumps(sorted(sys.modules)))"
    loaded = set(run(code, tmp_path))
    assert not loaded & {"torch", "triton", "diffusers", "open_clip", "transformers", "PIL"}


def test_help_loads_nothing_heavy(tmp_path):
    """By every way to start it: the console script's function and `python -m knnfast`."""
    code = (
        "import sys, json, runpy\n"
        "sys.argv = ['knnfast', {arguments}'--help']\n"
        "sys.stdout, out = sys.stderr, sys.stdout\n"
        "try:\n"
        "    {start}\n"
        "except SystemExit as e:\n"
        "    assert e.code == 0\n"
        "print(json.dumps(sorted(sys.modules)), file=out)"
    )
    for arguments in ("", "'generate', ", "'database', 'build', "):
        for start in (
            "import knnfast.cli; knnfast.cli.main()",
            "runpy.run_module('knnfast', run_name='__main__')",
        ):
            loaded = set(run(code.format(arguments=arguments, start=start), tmp_path))
            assert not loaded & {"torch", "numpy", "PIL", "tqdm"}


def test_search_imports_without_torch(tmp_path):
    code = (
        "import sys, json; sys.modules['torch'] = None\n"
        "import numpy as np, knnfast\n"
        "ix = knnfast.Index(4); ix.add(np.eye(4, dtype=np.float32))\n"
        "print(json.dumps(ix.search(np.eye(4, dtype=np.float32)[2], 1)[1].tolist()))"
    )
    assert run(code, tmp_path) == [2]


def test_every_public_name_exists():
    import knnfast

    for name in knnfast.__all__:
        assert getattr(knnfast, name) is not None
    assert {name for name in dir(knnfast) if not name.startswith("__")} == {*knnfast.__all__} - {
        "__version__"
    }
    with pytest.raises(AttributeError, match="no_such_name"):
        knnfast.no_such_name  # noqa: B018


def test_generation_needs_no_model_zoo(tmp_path):
    code = (
        "import sys, json, knnfast; knnfast.KNNDiffusion.from_pretrained('stickers')\n"
        "print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    )
    assert not set(run(code, tmp_path)) & {"diffusers", "open_clip", "transformers", "torchvision"}


@pytest.mark.slow
def test_sdist_and_wheel_are_whole(tmp_path):
    """The wheel is built from the sdist, which has no other sources to fall back on."""
    made = ["egg_info", "--egg-base", str(tmp_path), "sdist", "--dist-dir", str(tmp_path)]
    subprocess.run([sys.executable, "setup.py", "-q", *made], cwd=ROOT, check=True)
    (sdist,) = tmp_path.glob("knnfast-*.tar.gz")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path)]
    # What nvcc compiles takes minutes, and test_cuda_build compiles it.
    subprocess.run([*build, str(sdist)], env={**os.environ, "KNNFAST_CUDA": "OFF"}, check=True)
    (wheel,) = tmp_path.glob("knnfast-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert not [n for n in names if n.startswith(("tests/", "kernels/", "bench/"))]
    assert any(n.startswith("knnfast/_C.") for n in names)
    assert wheel.stat().st_size < 64e6

    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True)
    code = (
        "import json, pathlib, knnfast, knnfast.kernels, knnfast._C\n"
        "pipe = knnfast.KNNDiffusion.from_pretrained('stickers')\n"
        "out = pipe('a red heart', steps=2, seed=0)\n"
        "print(json.dumps([knnfast.__file__, knnfast._C.__file__, out.images[0].size[0]]))"
    )
    # -P and an empty working folder: nothing of the repository can be picked up.
    package, extension, size = run(code, tmp_path, PYTHONPATH=str(site), PYTHONSAFEPATH="1")
    assert Path(package).is_relative_to(site)
    assert Path(extension).is_relative_to(site)
    assert size > 0
