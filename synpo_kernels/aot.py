"""Compile every kernel for every launch configuration, with no GPU, and report what it costs there.

    python -m synpo_kernels.aot [--arch 80 90 100] [--hidden 3584] [--only 'exp bf16' ...] [--cache FOLDER]

Prints one row a kernel: registers, bytes spilled, shared memory, tensor-core and copy instructions found in the PTX.
Exits with 1 if a kernel spills more than its case allows, if ptxas serialises its wgmma instructions (C75xx), if it needs
more shared memory than a block can have on that chip, or if it does not assemble. Needs triton alone, with its bundled ptxas.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .kernels.variants import Case

# What a thread block may use, in bytes (CUDA programming guide, table of compute capabilities).
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
MARKS = {
    "wgmma": r"wgmma\.mma_async",
    "tcgen05": r"tcgen05\.mma",
    "mma": r"\bmma\.sync",
    "tma": r"cp\.async\.bulk\.tensor",
}
FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Report:
    """What the assembler says of a case; `problems` is empty for a good one."""

    registers: int
    spilled: int  # bytes, stores and loads
    shared: int  # bytes
    marks: tuple[str, ...]
    problems: tuple[str, ...]


def compile_case(case: Case) -> Report:
    """Compile with triton, listen to what ptxas -v says on the way, and read the verdict."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.errors import PTXASError

    names = case.kernel.arg_names
    source = ASTSource(
        fn=case.kernel,
        signature=case.signature(),
        constexprs={(names.index(name),): value for name, value in case.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in case.aligned()},
    )
    heard = io.StringIO()
    knobs = triton.knobs
    # ptxas speaks only when it runs, so nothing may come from triton's own cache
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(heard), knobs.cache.scope(), knobs.nvidia.scope():
        knobs.cache.dir, knobs.nvidia.dump_ptxas_log = folder, True
        try:
            compiled = triton.compile(source, target=GPUTarget("cuda", case.arch, 32), options=case.options)
        except PTXASError as error:
            return judge(case.arch, "", 0, str(error), case.spills)
    return judge(case.arch, compiled.asm["ptx"], compiled.metadata.shared, heard.getvalue(), case.spills)


def judge(arch: int, ptx: str, shared: int, said: str, spills: int = 0) -> Report:
    """The verdict on a kernel from its PTX, its shared memory in bytes, the output of ptxas -v and the bytes it may spill."""
    spilled = sum(int(count) for count in re.findall(r"(\d+) bytes spill", said))
    registers = re.search(r"Used (\d+) registers", said)
    limit = SHARED_LIMIT[arch]
    problems = []
    if registers is None:
        problems.append(f"ptxas failed: {said.strip()[:300]}")
    if spilled > spills:
        problems.append(f"spills {spilled} bytes: take a smaller tile or more warps")
    if serialised := re.search(r"C75\d\d.*", said):
        problems.append(f"ptxas serialises wgmma: {serialised[0]}")
    if shared > limit:
        problems.append(f"{shared} bytes of shared memory, sm_{arch} has {limit}: take fewer stages")
    marks = tuple(mark for mark, pattern in MARKS.items() if re.search(pattern, ptx))
    return Report(int(registers[1]) if registers else 0, spilled, shared, marks, tuple(problems))


@cache
def _state() -> str:
    """What reports depend on besides their case: the sources of the kernels and of this module, and triton's version."""
    import triton

    digest = hashlib.sha256(triton.__version__.encode())
    for path in [Path(__file__), *sorted((FOLDER / "kernels").glob("*.py"))]:
        if path.name != "configs.py":  # its values are part of the case
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _place(case: Case, folder: Path) -> Path:
    kernel = case.kernel.fn.__name__
    parts = (_state(), kernel, case.arch, case.signature(), case.aligned(), case.constants, case.options, case.spills)
    return folder / f"{hashlib.sha256(repr(parts).encode()).hexdigest()}.json"


def recall(case: Case, folder: Path) -> Report | None:
    """The report kept in `folder` for this very case, sources and triton, or None."""
    try:
        kept = json.loads(_place(case, folder).read_text())
    except FileNotFoundError:
        return None
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in kept.items()}
    return Report(**values)


def keep(case: Case, report: Report, folder: Path) -> None:
    """Write the report for `recall`, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".part", delete=False) as file:
        json.dump(asdict(report), file)
    os.replace(file.name, _place(case, folder))


def _compile_task(task: tuple[int, int, str]) -> Report:
    from .kernels.variants import cases

    arch, hidden, name = task
    return compile_case(next(case for case in cases([arch], hidden) if case.name == name))


def _reports(wanted: list[Case], hidden: int, jobs: int, folder: Path | None) -> Iterable[tuple[Case, Report]]:
    """Each case with its report, in order, kept ones first looked for in `folder`."""
    known = {} if folder is None else {(case.arch, case.name): recall(case, folder) for case in wanted}
    missing = [case for case in wanted if known.get((case.arch, case.name)) is None]
    tasks = [(case.arch, hidden, case.name) for case in missing]
    with ProcessPoolExecutor(max(1, min(jobs, len(tasks))), mp_context=get_context("spawn")) as pool:
        fresh = iter(map(_compile_task, tasks) if jobs == 1 else pool.map(_compile_task, tasks))
        for case in wanted:
            report = known.get((case.arch, case.name))
            if report is None:
                report = next(fresh)
                if folder is not None:
                    keep(case, report, folder)
            yield case, report


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m synpo_kernels.aot", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=sorted(SHARED_LIMIT), choices=sorted(SHARED_LIMIT))
    parser.add_argument("--hidden", type=int, default=3584, help="hidden size D the kernels are specialised for")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="KERNEL", help="names of kernels as the table gives them"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="kernels compiled side by side")
    parser.add_argument("--cache", type=Path, help="folder of reports: what did not change is not compiled again")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET"):
        parser.error("TRITON_INTERPRET is set: unset it, the interpreter replaces the compiler")
    from .kernels.variants import cases

    every = list(cases(options.arch, options.hidden))
    if unknown := set(options.only) - {case.name for case in every}:
        parser.error(f"no kernel is called {sorted(unknown)}; there are {sorted({case.name for case in every})}")
    wanted = [case for case in every if not options.only or case.name in options.only]
    print(
        f"{'kernel':<42}{'chip':<9}{'tile':<14}{'warps':>5}{'stages':>7}{'registers':>10}{'spilled':>8}{'shared':>8}  uses"
    )
    failed = 0
    for case, report in _reports(wanted, options.hidden, options.jobs, options.cache):
        print(
            f"{case.name:<42}sm_{case.arch:<6}{case.tile:<14}{case.options['num_warps']:>5}{case.options['num_stages']:>7}"
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
