"""Compile-only tier: every Triton kernel for sm_80, sm_90 and sm_100, without a GPU.

An interpreted kernel cannot be compiled in the same process, so these tests run on their own:
`TRITON_INTERPRET=0 pytest -m compile tests/test_compile.py`.
"""

import os
import re
import subprocess
import tempfile

import pytest
import torch

pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted in this process"
    ),
]

KINDS = {80: (108, 80), 86: (84, 86), 90: (132, 90), 100: (148, 80)}  # of `multiprocessors`


def attention(dtype, H, N, B=16, L=1024, D=1024):
    from knnfast.kernels.neighbour_attention import launch_neighbour_attention

    x, A, C = (torch.empty(s, dtype=dtype) for s in ((B, L, D), (B, D, N, H), (B, N, H, D)))
    a, bias, ada = (torch.empty(s, dtype=dtype) for s in ((B, N, H), (D,), (B, D)))
    mask = torch.ones(B, N, dtype=torch.bool)
    launch_neighbour_attention(x, A, a, C, bias, mask, ada, ada, True, 1e-5, True)


def tokens(B, L):
    return torch.zeros(B, L, dtype=torch.int64)


def draws(B):
    """Weights, image indices and seed of a step."""
    return torch.zeros(7, dtype=torch.float64), torch.arange(B), tokens(1, 1)[0]


def step(dtype, K, B=1, L=1024, null=False, rule=(1.0, 1.0, 1.0, 0), purity=None):
    from knnfast.kernels.transition_step import launch_transition_step

    logits = torch.empty(B, L, K, dtype=dtype)
    null = logits if null else None
    launch_transition_step(logits, null, tokens(B, L), *draws(B), *rule, purity)


def head(dtype, K, B=1, L=1024, D=1024):
    from knnfast.kernels.sample_head import launch_sample_head

    features, weight, bias = (torch.empty(s, dtype=dtype) for s in ((B, L, D), (K, D), (K,)))
    launch_sample_head(
        features, None, weight, bias, tokens(B, L), *draws(B), 1.0, 1.0, 1.0, 0
    )  # fmt: skip


def loss(dtype, K, B=1, L=1024):
    from knnfast.kernels.transition_loss import launch_transition_loss

    logits, ones = torch.empty(B, L, K, dtype=dtype), torch.ones(B, dtype=torch.float64)
    steps = torch.ones(B, 7, dtype=torch.float64)
    launch_transition_loss(logits, None, tokens(B, L), tokens(B, L), steps, ones, ones)


FULL, HALF, BFLOAT = torch.float32, torch.float16, torch.bfloat16

# id: the call, which of its launches, registers, shared bytes, a wide load is wanted
CASES = {
    "step-fp16-4096": (lambda: step(HALF, 4096), 1, 255, 40_000, True),
    "step-fp32-1024": (lambda: step(FULL, 1024), 1, 255, 20_000, True),
    "step-guided-truncated": (
        lambda: step(HALF, 4096, null=True, rule=(2.0, 1.0, 0.9, 5)), 1, 255, 40_000, True,
    ),
    "step-purity-scores": (lambda: step(HALF, 4096, purity=1.0), 0, 255, 40_000, False),
    "step-purity-draws": (lambda: step(HALF, 4096, purity=1.0), 1, 255, 40_000, False),
    "step-8192": (
        lambda: step(HALF, 8192, null=True, rule=(2.0, 1.0, 1.0, 0)), 1, 255, 70_000, True,
    ),
    "loss-1024": (lambda: loss(FULL, 1024), 0, 255, 20_000, True),
    "loss-4096": (lambda: loss(HALF, 4096), 0, 240, 20_000, True),
    "loss-8192": (lambda: loss(HALF, 8192), 0, 255, 20_000, True),
    "choose": (lambda: head(HALF, 4096), 0, 96, 4_096, False),
    "head": (lambda: head(HALF, 4096), 1, 168, 100_000, True),
    "head-b16": (lambda: head(HALF, 4096, B=16), 1, 255, 100_000, True),
    "head-fp32": (lambda: head(FULL, 4096, B=16), 1, 255, 101_376, True),
    "head-rows": (lambda: head(HALF, 4096), 2, 255, 40_000, True),
    "attention-h16-n11": (lambda: attention(HALF, 16, 11), 0, 255, 160_000, True),
    "attention-h8-n11": (lambda: attention(HALF, 8, 11), 0, 255, 80_000, True),
    "attention-bf16": (lambda: attention(BFLOAT, 16, 11), 0, 255, 160_000, True),
    "attention-h1-n1": (lambda: attention(HALF, 1, 1, L=8, D=47), 0, 255, 160_000, False),
    "attention-one-image": (lambda: attention(HALF, 16, 11, B=1), 0, 255, 160_000, True),
    "attention-h16-n32": (lambda: attention(HALF, 16, 32), 0, 255, 160_000, True),
    "attention-h16-n33": (lambda: attention(HALF, 16, 33), 0, 255, 160_000, True),
    "attention-h16-n128": (lambda: attention(HALF, 16, 128), 0, 255, 160_000, True),
    "attention-fp32-h8": (lambda: attention(FULL, 8, 11), 0, 255, 101_376, True),
    "attention-fp32-h16": (lambda: attention(FULL, 16, 11), 0, 255, 101_376, True),
    "attention-fp32-n32": (lambda: attention(FULL, 16, 32), 0, 255, 101_376, True),
    "attention-fp32-n33": (lambda: attention(FULL, 16, 33), 0, 255, 160_000, True),
}  # fmt: skip


def launches(monkeypatch, arch, call):
    """The launches of a call on CPU tensors as this GPU would see them: (kernel, its arguments)."""
    from knnfast.kernels import neighbour_attention, sample_head, transition_step
    from triton.runtime.jit import JITFunction

    found = []

    def run(kernel, *, grid, warmup, **arguments):
        found.append((kernel, arguments))

    monkeypatch.setattr(JITFunction, "run", run)
    for file in (neighbour_attention, sample_head, transition_step):
        monkeypatch.setattr(file, "multiprocessors", lambda _: KINDS[arch])
    call()
    return found


def build(kernel, arguments, arch):
    """Compile what the JIT would: its own specialisation of the arguments."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    target = GPUTarget("cuda", arch, 32)
    backend = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, kinds, options = bind(**arguments)
    options, *source = kernel._pack_args(backend, arguments, bound, kinds, options)
    return triton.compile(ASTSource(kernel, *source), target=target, options=options.__dict__)


def usage(compiled):
    """Registers and bytes of local memory a thread, from the cubin itself."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(compiled.asm["cubin"])
        f.flush()
        tool = knobs.nvidia.cuobjdump.path
        text = subprocess.run(
            [tool, "-res-usage", f.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+).* LOCAL:(\d+)", text)
    assert found, text
    return int(found[1]), int(found[2]) + int(found[3])


def unsettled(ttgir):
    """Products of sm_90 loops that may still run when what they read is written again.

    These are such as a later product is not waited for, and that read registers, or a buffer which
    copies before the loop fill to the last slot: then an iteration fills that which it reads.
    """
    lines, found = ttgir.splitlines(), []

    def made(name):
        return next((line for line in lines if line.lstrip().startswith(f"{name} = ")), "")

    def buffer(name):
        while part := re.search(r"= ttg\.memdesc_\w+ (%\w+)", made(name)):
            name = part[1]
        return name

    for loop, line in enumerate(lines):
        if " scf.for " not in line:
            continue
        indent = re.match(" *", line)[0]
        end = next(i for i in range(loop + 1, len(lines)) if lines[i].startswith(indent + "}"))
        filled = re.findall(r"async_copy_global_to_local %\w+, (%\w+)", "\n".join(lines[:loop]))
        filled = [buffer(slot) for slot in filled]
        for i in range(loop, end):
            product = re.search(r"= ttng\.warp_group_dot (%\w+), (%\w+),", lines[i])
            if not product or "isAsync = true" not in lines[i]:
                continue
            waits = re.findall(r"warp_group_dot_wait .*pendings = (\d+)", "\n".join(lines[i:end]))
            if waits and waits[0] == "0":
                continue
            for operand in map(buffer, product.groups()):
                slots = re.search(r"local_alloc : \(\) -> !ttg\.memdesc<(\d+)x", made(operand))
                if not slots or int(slots[1]) <= filled.count(operand):
                    found.append(lines[i].strip())
    return found


@pytest.mark.parametrize("case", ["attention-h16-n11", "attention-h8-n11"])
def test_products_that_are_not_waited_for_are_found(monkeypatch, case):
    ((kernel, arguments),) = launches(monkeypatch, 90, CASES[case][0])
    assert unsettled(build(kernel, arguments | {"WAITS": False}, 90).asm["ttgir"])


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("case", CASES)
def test_compiles_within_budget(monkeypatch, case, arch):
    call, which, registers, shared, wide = CASES[case]
    kernel, arguments = launches(monkeypatch, arch, call)[which]
    compiled = build(kernel, arguments, arch)
    got, local = usage(compiled)
    print(case, arch, "registers", got, "local", local, "shared", compiled.metadata.shared)
    assert local <= 16, "spills"  # ptxas parts with a few to fit one more program
    assert got <= registers
    assert compiled.metadata.shared <= shared
    assert not unsettled(compiled.asm["ttgir"])
    ptx = compiled.asm["ptx"]
    if wide:
        assert re.search(
            r"ld\.global\S*\.v[48]|cp\.async\.c[ag]\S* \[[^]]*\], \[[^]]*\], 0x10", ptx
        )
    if "fp32" in case:
        assert "tf32" not in ptx


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize(
    ("K", "rule", "local"),
    [(16384, (2.0, 1.0, 0.9, 5), 512), (65536, (2.0, 1.0, 0.9, 5), 5120)],
)  # fmt: skip
def test_rows_wider_than_the_registers(monkeypatch, K, rule, local, arch):
    """Some of them spill, so many bytes a thread at most."""
    kernel, arguments = launches(monkeypatch, arch, lambda: step(HALF, K, null=True, rule=rule))[1]
    compiled = build(kernel, arguments, arch)
    assert usage(compiled)[1] <= local
    assert compiled.metadata.shared <= 4096


@pytest.mark.parametrize(
    ("dtype", "N"), [(HALF, 11), (HALF, 32), (HALF, 33), (FULL, 11), (FULL, 32)]
)
def test_attention_fits_small_shared_memories(monkeypatch, dtype, N):
    """sm_86, sm_89 and sm_120 have 99 KiB."""
    found = launches(monkeypatch, 86, lambda: attention(dtype, 16, N))
    assert build(*found[0], 86).metadata.shared <= 99 << 10


@pytest.mark.parametrize(("arch", "dtype", "N"), [(90, HALF, 129), (80, FULL, 65), (86, FULL, 33)])
def test_attention_names_what_no_shared_memory_holds(monkeypatch, arch, dtype, N):
    with pytest.raises(ValueError, match=r"folded: heads times embeddings.*fold=False"):
        launches(monkeypatch, arch, lambda: attention(dtype, 16, N))
