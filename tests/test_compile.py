"""Compile-only tier: every Triton kernel for sm_80, sm_90 and sm_100, without a GPU.

An interpreted kernel cannot be compiled in the same process, so these tests run on their own:
`TRITON_INTERPRET=0 pytest -m compile tests/test_compile.py`.
"""

import os
import re
import subprocess
import tempfile

import pytest

pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted in this process"
    ),
]

F, H, B, D8, I8, I4 = "*fp32", "*fp16", "*bf16", "*fp64", "*i64", "*i32"
STEP_ARGS = {
    "null_ptr": None, "x_t_ptr": I8, "weights_ptr": D8, "image_ptr": I8, "seed_ptr": I8,
    "rows_ptr": I8, "count_ptr": I8, "out_ptr": I8, "score_ptr": F, "best_ptr": F,
    "chosen_ptr": I4, "L": "i32", "K": "i32", "stride_row": "i32", "stride_null": "i32",
    "stride_weights": "i32", "guidance": "fp32", "inverse_temperature": "fp32", "top_r": "fp32",
    "top_k": "i32", "purity": "fp32",
}  # fmt: skip


def step(dtype, block_k, **flags):
    constants = {"HAS_NULL": False, "TRUNCATE": False, "COMPACT": False, "MODE": 0} | flags
    signature = {"logits_ptr": dtype} | STEP_ARGS | {"null_ptr": dtype}
    return (
        "transition_step", "transition_step_kernel", signature, constants | {"BLOCK_K": block_k}
    )  # fmt: skip


def attention(dtype, NP, HP, BLOCK_L, BLOCK_D=32):
    pointers = ["x", "A", "a", "C", "bias", "mask", "scale", "shift", "y"]
    signature = {f"{p}_ptr": dtype for p in pointers} | {"mask_ptr": "*u8"}
    signature |= {"L": "i32", "D": "i32", "N": "i32", "H": "i32", "eps": "fp32"}
    signature |= {f"stride_{s}": "i32" for s in ("xb", "xl", "scale", "shift")}
    constants = {"NORM": True, "RESIDUAL": True, "HAS_SCALE": True, "HAS_SHIFT": True}
    constants |= {"NP": NP, "HP": HP, "BLOCK_L": BLOCK_L, "BLOCK_D": BLOCK_D}
    return "neighbour_attention", "neighbour_attention_kernel", signature, constants


LOSS = {
    "logits_ptr": H, "x_0_ptr": I8, "x_t_ptr": I8, "steps_ptr": D8, "weight_ptr": D8,
    "auxiliary_ptr": D8, "grad_ptr": H, "kl_ptr": D8, "nll_ptr": D8, "L": "i32", "K": "i32",
    "stride_row": "i32", "stride_grad": "i32",
}  # fmt: skip
CHOOSE = {
    "x_t_ptr": I8, "weights_ptr": D8, "image_ptr": I8, "seed_ptr": I8, "out_ptr": I8,
    "need_ptr": I8, "total": "i32", "L": "i32", "K": "i32", "stride_weights": "i32",
}  # fmt: skip
HEAD = {
    "features_ptr": H, "weight_ptr": H, "bias_ptr": H, "rows_ptr": I8, "count_ptr": I8,
    "out_ptr": F, "K": "i32", "D": "i32", "stride_f": "i32", "stride_w": "i32",
}  # fmt: skip

# id: (file, kernel, signature, constants), warps, registers, shared bytes, a wide load is wanted
CASES = {
    "step-fp16-4096": (step(H, 4096), 8, 128, 40_000, True),
    "step-fp32-1024": (step(F, 1024), 1, 255, 20_000, True),
    "step-guided-truncated": (step(H, 4096, HAS_NULL=True, TRUNCATE=True), 8, 160, 40_000, True),
    "step-compact": (step(F, 4096, COMPACT=True), 8, 128, 40_000, True),
    "step-purity-scores": (step(H, 4096, MODE=1), 8, 128, 40_000, False),
    "step-purity-draws": (step(H, 4096, MODE=2), 8, 128, 40_000, False),
    "step-8192": (step(H, 8192, HAS_NULL=True), 8, 255, 70_000, True),
    "loss-4096": (
        ("transition_loss", "transition_loss_kernel", LOSS, {"BLOCK_K": 4096}),
        16, 128, 20_000, True,
    ),
    "choose": (
        ("sample_head", "transition_choose_kernel", CHOOSE, {"BLOCK": 256}), 4, 96, 0, False,
    ),
    "head": (
        (
            "sample_head", "sample_head_kernel", HEAD,
            {"HAS_BIAS": True, "BLOCK_R": 16, "BLOCK_K": 128, "BLOCK_D": 64},
        ),
        4, 168, 100_000, True,
    ),
    "attention-h16-n11": (attention(H, 16, 16, 64), 8, 255, 160_000, True),
    "attention-bf16": (attention(B, 16, 16, 64), 8, 255, 160_000, True),
    "attention-h8-n11": (attention(H, 16, 8, 128), 8, 255, 160_000, True),
    "attention-h1-n1": (attention(H, 16, 1, 16), 8, 255, 160_000, False),
}  # fmt: skip


def build(case, arch, warps):
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    file, name, signature, constants = case
    fn = getattr(importlib.import_module(f"knnfast.kernels.{file}"), name)
    signature = {arg: signature.get(arg, "constexpr") for arg in fn.arg_names}
    # What the JIT infers for torch's allocations and for sizes that are multiples of 16.
    aligned = [
        i for i, arg in enumerate(fn.arg_names)
        if signature[arg].startswith("*")
        or arg in ("K", "D", "stride_row", "stride_null", "stride_grad", "stride_f", "stride_w",
                   "stride_xb", "stride_xl", "stride_scale", "stride_shift")
    ]  # fmt: skip
    source = ASTSource(
        fn, signature, constexprs={(fn.arg_names.index(k),): v for k, v in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )  # fmt: skip
    return triton.compile(
        source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps, "num_stages": 2}
    )


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


def test_the_widest_attention_fits():
    """1,024 scores a token in fp32 (they may spill): within an A100's 163 KiB."""
    assert build(attention(F, 64, 16, 16, BLOCK_D=16), 80, 8).metadata.shared <= 163 << 10


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("case", CASES)
def test_compiles_within_budget(case, arch):
    spec, warps, registers, shared, wide = CASES[case]
    compiled = build(spec, arch, warps)
    got, local = usage(compiled)
    print(case, arch, "registers", got, "local", local, "shared", compiled.metadata.shared)
    assert local == 0, "spills"
    assert got <= registers
    assert compiled.metadata.shared <= shared
    if wide:
        ptx = compiled.asm["ptx"]
        assert re.search(
            r"ld\.global\S*\.v[48]|cp\.async\.c[ag]\S* \[[^]]*\], \[[^]]*\], 0x10", ptx
        )
