"""Every .cu compiles for each GPU target, without spills, within its budget. Needs nvcc, no GPU."""

import functools
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parent.parent / "csrc"
SOURCES = sorted(p.name for p in (CSRC / "cuda").glob("*.cu"))
TARGETS = ["80", "90a", "100"]

# What the Hopper kernel's three warpgroups share out as 24 + 2 x 240. With fewer, setmaxnreg.inc
# would wait for ever.
HOPPER_REGISTERS = (24 + 2 * 240) // 3

# Most registers a thread of a scan kernel may use: a tenth more than today's widest instance uses,
# 192 and 199. The blocks meant to share a multiprocessor, two of 128 threads and one of 256, would
# find 256 a thread in its 65,536.
REGISTERS = {
    "topk_scan_kernel": 211,
    "topk_tiled_kernel": 218,
    "sm90_topk_kernel": HOPPER_REGISTERS,
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc"),
]


@functools.cache
def compile_kernels(source, target, folder):
    """{kernel name: {registers, stack, spills}} as ptxas reports them."""
    done = subprocess.run(
        ["nvcc", "-std=c++17", "-O3", f"-gencode=arch=compute_{target},code=sm_{target}",
         "-Xptxas", "-v", "-Werror", "all-warnings", "-cubin", f"-I{CSRC}",
         str(CSRC / "cuda" / source), "-o", str(folder / f"{source}.{target}.cubin")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for complaint in ("serialized", "setmaxnreg ignored"):  # of wgmma; ptxas says so in passing
        assert complaint not in done.stderr, done.stderr
    found = {}
    entry = re.compile(
        r"Compiling entry function '(?P<name>\S+)'.*?"
        r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
        r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
        re.S,
    )
    for m in entry.finditer(done.stderr):
        found[m["name"]] = {
            "registers": int(m["registers"]),
            "stack": int(m["stack"]),
            "spills": int(m["stores"]) + int(m["loads"]),
        }
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cuda")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", SOURCES)
def test_compiles_without_spills(source, target, folder):
    kernels = compile_kernels(source, target, folder)
    assert bool(kernels) == ("__global__" in (CSRC / "cuda" / source).read_text())
    for name, use in kernels.items():
        assert use["spills"] <= 32, (name, use)  # bytes, outside the scans' loops
        for kernel, limit in REGISTERS.items():
            if kernel in name:
                assert use["spills"] == use["stack"] == 0, (name, use)
                assert use["registers"] <= limit, (name, use)
        if target == "90a" and "sm90_topk_kernel" in name:
            assert use["registers"] == HOPPER_REGISTERS, (name, use)


def test_every_scan_kernel_is_there(folder):
    """The budgets above are met by kernels that exist: every instance, under its name."""
    counts = dict.fromkeys(REGISTERS, 0)
    for source in SOURCES:
        for name in compile_kernels(source, "90a", folder):
            for kernel in counts:
                counts[kernel] += kernel in name
    assert counts == {"topk_scan_kernel": 8, "topk_tiled_kernel": 4, "sm90_topk_kernel": 10}


def test_hopper_uses_its_own_instructions(folder):
    """The sm_90a scan holds wgmma and bulk copies, not the portable path under another name."""
    done = subprocess.run(
        ["nvcc", "-std=c++17", "-O3", "-gencode=arch=compute_90a,code=compute_90a", "-ptx",
         f"-I{CSRC}", str(CSRC / "cuda/topk_scan_sm90.cu"), "-o", str(folder / "sm90.ptx")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ptx = (folder / "sm90.ptx").read_text()
    for instruction in (
        "wgmma.mma_async.sync.aligned.m64n256k16.f32.f16.f16",
        "wgmma.mma_async.sync.aligned.m64n256k32.s32.s8.s8",
        "cp.async.bulk.shared::cluster.global.mbarrier",
        "setmaxnreg.inc",
    ):
        assert instruction in ptx


def test_hopper_kernel_without_its_instructions_stops(folder):
    """Compiled for plain sm_90 it ends in a trap, not in bounds that nobody wrote."""
    subprocess.run(
        ["nvcc", "-std=c++17", "-O3", "-gencode=arch=compute_90,code=compute_90", "-ptx",
         f"-I{CSRC}", str(CSRC / "cuda/topk_scan_sm90.cu"), "-o", str(folder / "plain.ptx")],
        check=True,
    )  # fmt: skip
    entries = (folder / "plain.ptx").read_text().split(".entry")[1:]
    assert entries
    assert all("trap;" in entry for entry in entries)


@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
@pytest.mark.parametrize("archs", ["90a-real", "90-real;80-virtual", ""])
def test_cudaarchs_narrows_the_build(archs, tmp_path):
    """To what it names; and only a build with sm_90a knows of the Hopper kernel."""
    done = subprocess.run(
        ["cmake", "-S", CSRC.parent, "-B", tmp_path, "-DKNNFAST_CUDA=ON",
         "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON"],
        capture_output=True, text=True, env=os.environ | {"CUDAARCHS": archs},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    entries = json.loads((tmp_path / "compile_commands.json").read_text())
    (command,) = (e["command"] for e in entries if e["file"].endswith("topk_cuda.cu"))
    targets = set(re.findall(r",code=\[?(\w+)", command))
    want = archs or "80-real;90a-real;100-real;90-virtual"
    names = {
        ("sm_" if kind == "real" else "compute_") + number
        for number, kind in (arch.split("-") for arch in want.split(";"))
    }
    assert targets == names
    assert ("-DKNN_SM90A" in command) == ("90a" in want)
