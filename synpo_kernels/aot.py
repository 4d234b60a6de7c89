"""Compile every kernel for every launch configuration, with no GPU, and report what it costs there.

    python -m synpo_kernels.aot [--arch 80 90 100] [--hidden 3584] [--only 'exp bf16' ...]

Prints one row a kernel: registers, bytes spilled, shared memory, tensor-core and copy instructions found in the PTX.
Exits with 1 if a kernel spills, if ptxas serialises its wgmma instructions (C75xx), if it needs more shared memory
than a block can have on that chip, or if it does not assemble. Needs triton alone, with its bundled ptxas.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

# What a thread block may use, in bytes (CUDA programming guide, table of compute capabilities).
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
MARKS = {
    "wgmma": r"wgmma\.mma_async",
    "tcgen05": r"tcgen05\.mma",
    "mma": r"\bmma\.sync",
    "tma": r"cp\.async\.bulk\.tensor",
}


@dataclass(frozen=True)
class Case:
    """One kernel specialised for one chip."""

    name: str
    kernel: Any  # a triton.jit function
    arch: int  # 80, 90, 100
    dtype: str  # triton's name of the input format
    config: Any  # TileConfig
    constants: dict[str, Any]


@dataclass(frozen=True)
class Report:
    """What the assembler says of a case; `problems` is empty for a good one."""

    registers: int
    spilled: int  # bytes, stores and loads
    shared: int  # bytes
    marks: tuple[str, ...]
    problems: tuple[str, ...]


def cases(archs: list[int], hidden: int) -> Iterator[Case]:
    """The kernel variants that `fused` launches, with the configurations it launches them with.

    bf16 in every variant; the other formats in their lightest and heaviest.
    """
    from .kernels.configs import exact_config, product_config, tile_config
    from .kernels.counted_product import counted_product_kernel
    from .kernels.exact_rows import exact_rows_kernel
    from .kernels.exp_tile import exp_tile_kernel

    for arch in archs:
        for dtype, precision in (("bf16", "ieee"), ("fp16", "ieee"), ("fp32", "ieee"), ("fp32", "tf32")):
            label = "tf32" if precision == "tf32" else dtype
            plain = {"D": hidden, "HAS_BIAS": False, "HAS_SOFTCAP": False, "WRITE": True, "PRECISION": precision}
            full = {**plain, "HAS_BIAS": True, "HAS_SOFTCAP": True}
            exponentials = {
                "exp": {**plain, "HAS_TARGET": False},
                "exp+target": {**plain, "HAS_TARGET": True},
                "exp+target+softcap+bias": {**full, "HAS_TARGET": True},
                "exp+softcap": {**full, "HAS_BIAS": False, "HAS_TARGET": False},
                "exp sums only": {**plain, "HAS_TARGET": False, "WRITE": False},
                "exp ragged D": {**plain, "HAS_TARGET": False, "D": hidden + 8},
                "exp counted": {**plain, "HAS_TARGET": False, "HAS_COUNT": True},
                "exp+target+softcap+bias counted": {**full, "HAS_TARGET": True, "HAS_COUNT": True},
            }
            for name, constants in exponentials.items():
                if dtype != "bf16" and name not in ("exp", "exp+target+softcap+bias"):
                    continue
                softcap, counted = "softcap" in name, "counted" in name
                config = tile_config(arch // 10, 4 if dtype == "fp32" else 2, softcap=softcap, counted=counted)
                constants = {"GROUP_N": config.group_n, "HAS_COUNT": False, **constants, **_blocks("NVD", config)}
                yield Case(f"{name} {label}", exp_tile_kernel, arch, dtype, config, constants)
            config = exact_config(arch // 10)
            constants = {**full, **_blocks("NVD", config)}
            yield Case(f"exact {label}", exact_rows_kernel, arch, dtype, config, constants)
            if dtype == "bf16":
                constants["WRITE"] = False
                yield Case(f"exact sums only {label}", exact_rows_kernel, arch, dtype, config, constants)
            config = product_config(arch // 10, 4 if dtype == "fp32" else 2)
            constants = {"GROUP_M": config.group_n, "PRECISION": precision, "stride_bd": 1, **_blocks("MDK", config)}
            for name, form in (
                ("product", {"SUM_COUNTED": False, "HAS_KEPT": False, "stride_ak": 1}),
                ("product over rows", {"SUM_COUNTED": True, "HAS_KEPT": False, "stride_am": 1}),
                ("product of kept columns", {"SUM_COUNTED": False, "HAS_KEPT": True, "stride_ak": 1}),
            ):
                yield Case(f"{name} {label}", counted_product_kernel, arch, dtype, config, {**constants, **form})


def _blocks(sizes: str, config: Any) -> dict[str, Any]:
    """A tile's rows, columns and inner size under the names of a kernel; strides of 1 are constants at launch too."""
    tile = (config.block_n, config.block_v, config.block_d)
    blocks: dict[str, Any] = {f"BLOCK_{size}": block for size, block in zip(sizes, tile)}
    return blocks | ({"stride_xd": 1, "stride_wd": 1} if sizes == "NVD" else {})


def compile_case(case: Case) -> Report:
    """Compile with triton, assemble with ptxas -v, and read the verdict."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = case.constants
    names = case.kernel.arg_names
    types = {name: _argument_type(name, case.dtype) for name in names if name not in constants}
    # triton notes divisibility by 16 at launch: pointers, strides, and the sizes M, D and K of real shapes
    aligned = [name for name in types if name.endswith("_ptr") or name.startswith("stride") or name in ("M", "D", "K")]
    source = ASTSource(
        fn=case.kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": case.config.num_warps, "num_stages": case.config.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", case.arch, 32), options=options)
    return _judge(case, compiled.asm["ptx"], compiled.metadata.shared)


def _compile_task(task: tuple[int, int, str]) -> Report:
    arch, hidden, name = task
    return compile_case(next(case for case in cases([arch], hidden) if case.name == name))


def _argument_type(name: str, dtype: str) -> str:
    if name.endswith("_ptr"):
        special = {"label_ptr": "i64", "flag_ptr": "i8", "count_ptr": "i32"}
        same_as_input = name in ("x_ptr", "w_ptr", "bias_ptr", "out_ptr", "direction_ptr", "a_ptr", "b_ptr")
        return "*" + special.get(name, dtype if same_as_input else "fp32")
    return "fp32" if name in ("logit_scale", "softcap") else "i32"


def _judge(case: Case, ptx: str, shared: int) -> Report:
    code, said = _assemble(ptx, case.arch)
    spilled = sum(int(count) for count in re.findall(r"(\d+) bytes spill", said))
    registers = re.search(r"Used (\d+) registers", said)
    limit = SHARED_LIMIT[case.arch]
    problems = []
    if code != 0 or registers is None:
        problems.append(f"ptxas failed: {said.strip()[:300]}")
    if spilled:
        problems.append(f"spills {spilled} bytes: take a smaller tile or more warps")
    if serialised := re.search(r"C75\d\d.*", said):
        problems.append(f"ptxas serialises wgmma: {serialised[0]}")
    if shared > limit:
        problems.append(f"{shared} bytes of shared memory, sm_{case.arch} has {limit}: take fewer stages")
    marks = tuple(mark for mark, pattern in MARKS.items() if re.search(pattern, ptx))
    return Report(int(registers[1]) if registers else 0, spilled, shared, marks, tuple(problems))


def _assemble(ptx: str, arch: int) -> tuple[int, str]:
    """(exit code, output) of the bundled `ptxas -v`; newer PTX is taken by ptxas-blackwell for every chip."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    name = f"sm_{arch}a" if arch >= 90 else f"sm_{arch}"
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "kernel.ptx")
        text.write_text(ptx)
        for tool in ("ptxas", "ptxas-blackwell"):
            if not (tools / tool).exists():
                continue
            command = [str(tools / tool), "-v", f"--gpu-name={name}", str(text), "-o", f"{folder}/kernel.cubin"]
            done = subprocess.run(command, capture_output=True, text=True)
            said = done.stdout + done.stderr
            if "Unsupported .version" not in said and "is not defined for option 'gpu-name'" not in said:
                break
        else:
            return 1, f"no bundled ptxas in {tools} takes this PTX"
    return done.returncode, said


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m synpo_kernels.aot", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=sorted(SHARED_LIMIT), choices=sorted(SHARED_LIMIT))
    parser.add_argument("--hidden", type=int, default=3584, help="hidden size D the kernels are specialised for")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="KERNEL", help="names of kernels as the table gives them"
    )
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET"):
        parser.error("TRITON_INTERPRET is set: unset it, the interpreter replaces the compiler")
    every = list(cases(options.arch, options.hidden))
    if unknown := set(options.only) - {case.name for case in every}:
        parser.error(f"no kernel is called {sorted(unknown)}; there are {sorted({case.name for case in every})}")
    wanted = [case for case in every if not options.only or case.name in options.only]
    print(
        f"{'kernel':<38}{'chip':<9}{'tile':<14}{'warps':>5}{'stages':>7}{'registers':>10}{'spilled':>8}{'shared':>8}  uses"
    )
    failed = 0
    tasks = [(case.arch, options.hidden, case.name) for case in wanted]
    workers = min(len(tasks), os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for case, report in zip(wanted, pool.map(_compile_task, tasks)):
            tile = "x".join(str(size) for size in (case.config.block_n, case.config.block_v, case.config.block_d))
            print(
                f"{case.name:<38}sm_{case.arch:<6}{tile:<14}{case.config.num_warps:>5}{case.config.num_stages:>7}"
                f"{report.registers:>10}{report.spilled:>8}{report.shared:>8}  {' '.join(report.marks)}",
                flush=True,
            )
            for problem in report.problems:
                print(f"  PROBLEM {problem}")
            failed += bool(report.problems)
    print(f"{len(wanted) - failed} of {len(wanted)} kernels are good")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
