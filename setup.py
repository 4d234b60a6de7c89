"""Build of the C++ extension `synpo_kernels._C`; everything else about the package is in pyproject.toml.

Nothing is compiled when this file is imported, and torch is never imported or downloaded: its headers and libraries are
found on disk, in this interpreter's site-packages even when the build runs in pip's isolated environment. The tensor ops
use libtorch's stable ABI, so one binary serves every torch from 2.11 on.

    torch or a C++ compiler missing   pure-Python package, the reason printed; the torch code path does the work
    a compile that fails              the same, loudly; SYNPO_REQUIRE_EXT=1 makes it an error instead
    csrc/cuda/*.cu                    built when nvcc is found (CUDA_HOME, or nvcc on PATH); SYNPO_BUILD_CUDA=0 leaves them
                                      out, =1 makes a missing toolkit or a failed compile an error
    SYNPO_CUDA_ARCHS="80 90"          the GPU architectures to build for
"""

from __future__ import annotations

import importlib.machinery
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
STABLE_ABI = "0x020b000000000000"  # torch 2.11, the oldest release the tensor ops may meet
CUDA_ARCHS = "80 90 100"


def say(message: str) -> None:
    print(f"synpo: {message}", file=sys.stderr, flush=True)


def flag(name: str, default: str, allowed: tuple[str, ...]) -> str:
    value = os.environ.get(name, default)
    if value not in allowed:
        raise SystemExit(f"synpo: {name}={value!r}; expected one of {', '.join(allowed)}")
    return value


def find_torch() -> tuple[Path, str] | None:
    """Folder and version of the installed torch. pip's build isolation hides site-packages from sys.path, it does not move it."""
    paths = [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    spec = importlib.machinery.PathFinder.find_spec("torch", paths)
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent
    found = re.search(r"__version__ = '([^']+)'", (folder / "version.py").read_text())
    return (folder, found[1]) if found else None


def find_cuda() -> Path | None:
    """The CUDA toolkit: CUDA_HOME, else what nvcc itself says (it may be a wrapper far from its toolkit)."""
    home = os.environ.get("CUDA_HOME")
    if home:
        return Path(home) if (Path(home) / "bin" / "nvcc").exists() else None
    if shutil.which("nvcc") is None:
        return None
    said = subprocess.run(["nvcc", "--dryrun", "x.cu"], capture_output=True, text=True).stderr
    here = re.search(r"_HERE_=(\S+)", said)
    return Path(here[1]).parent if here else None


def cuda_sources() -> tuple[list[Path], Path | None]:
    """The CUDA sources to build and the toolkit to build them with; no sources when CUDA is off or out of reach."""
    wanted = flag("SYNPO_BUILD_CUDA", "auto", ("auto", "0", "1"))
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    if wanted == "0" or not sources:
        return [], None
    toolkit = find_cuda()
    if toolkit is None:
        if wanted == "1":
            raise SystemExit("synpo: SYNPO_BUILD_CUDA=1 but no CUDA toolkit was found; set CUDA_HOME to its folder")
        say("no CUDA toolkit found (CUDA_HOME, nvcc): the extension is built for the CPU only")
        return [], None
    return sources, toolkit


def extensions() -> list[Extension]:
    if find_torch() is None:
        reason = "no torch in this environment"
    elif shutil.which(compiler()) is None:
        reason = f"no C++ compiler ({compiler()})"
    else:
        sources = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").glob("*.cpp"))]
        depends = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").rglob("*.[hc]*"))]
        return [Extension("synpo_kernels._C", sources, depends=[*depends, "setup.py"], language="c++")]
    if os.environ.get("SYNPO_REQUIRE_EXT") == "1":
        raise SystemExit(f"synpo: SYNPO_REQUIRE_EXT=1 but the C++ extension cannot be built: {reason}")
    say(f"{reason}: installing without the C++ extension, the torch code path will be used")
    return []


def compiler() -> str:
    return (os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++").split()[0]


class BuildExtension(build_ext):
    """Finds torch, pybind11 and CUDA, compiles; a failure leaves a pure-Python package unless SYNPO_REQUIRE_EXT=1."""

    def build_extension(self, ext: Extension) -> None:
        try:
            self.configure(ext)
            super().build_extension(ext)
        except Exception as error:
            if "1" in (os.environ.get("SYNPO_REQUIRE_EXT"), os.environ.get("SYNPO_BUILD_CUDA")):
                raise
            for stale in (ROOT / "synpo_kernels").glob("_C.*.so"):  # an earlier build, of other sources
                stale.unlink()
            say("=" * 78)
            say(f"the C++ extension did not compile: {error}")
            say("installing without it: the torch code path will be used (slower, same results).")
            say("SYNPO_REQUIRE_EXT=1 makes this an error; pip install -v shows the compiler's output.")
            say("=" * 78)
            ext.optional = True  # setuptools then leaves the missing file out of the wheel and of an editable install

    def configure(self, ext: Extension) -> None:
        import pybind11

        found = find_torch()
        assert found is not None, "extensions() yields nothing where torch is missing"
        torch, version = found
        # pybind11's own headers first: the copy some torch releases ship (2.11) refuses TORCH_TARGET_VERSION.
        ext.include_dirs += [str(ROOT / "csrc"), pybind11.get_include(), str(torch / "include")]
        ext.library_dirs.append(str(torch / "lib"))
        ext.libraries.append("torch_cpu")
        # No FMA contraction: the op must round exactly as separate multiplications and a subtraction in torch do.
        # GCC 12 finds uninitialised values in its own AVX-512 headers.
        ext.extra_compile_args += [
            "-std=c++17",
            "-O3",
            "-g0",
            "-ffp-contract=off",
            "-fno-trapping-math",
            "-fvisibility=hidden",
            "-Wall",
            "-Wno-uninitialized",
        ]
        ext.define_macros += [
            ("TORCH_TARGET_VERSION", STABLE_ABI),
            ("SYNPO_VERSION", f'"{self.distribution.get_version()}"'),
            ("SYNPO_TORCH_VERSION", f'"{version}"'),
        ]
        sources, toolkit = cuda_sources()
        if toolkit is not None:
            sources = self.add_cuda(ext, sources, toolkit, torch)
        shown = " ".join([*ext.extra_compile_args, *(f"CUDA:{source.name}" for source in sources)])
        ext.define_macros.append(("SYNPO_COMPILE_FLAGS", f'"{shown}"'))

    def add_cuda(self, ext: Extension, sources: list[Path], toolkit: Path, torch: Path) -> list[Path]:
        """Compile the CUDA sources into the extension; the ones it now holds: none after a failure, unless CUDA was asked for."""
        try:
            objects = [self.compile_cuda(source, toolkit, torch) for source in sources]
        except Exception as error:
            if os.environ.get("SYNPO_BUILD_CUDA") == "1":
                raise
            say(f"the CUDA sources did not compile, the extension is built for the CPU only: {error}")
            return []
        ext.extra_objects += objects
        ext.define_macros.append(("SYNPO_WITH_CUDA", "1"))
        ext.library_dirs.append(str(next(p for p in (toolkit / "lib64", toolkit / "lib") if p.is_dir())))
        ext.libraries += ["cudart_static", "dl", "rt", "pthread"]
        return sources

    def compile_cuda(self, source: Path, toolkit: Path, torch: Path) -> str:
        """One .cu to an object file. Static cudart and stable headers: the binary also loads beside a CPU-only torch."""
        target = Path(self.build_temp) / f"{source.stem}.cu.o"
        target.parent.mkdir(parents=True, exist_ok=True)
        archs = os.environ.get("SYNPO_CUDA_ARCHS", CUDA_ARCHS).split()
        codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
        codes.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
        self.spawn(
            [
                str(toolkit / "bin" / "nvcc"),
                *("-c", str(source), "-o", str(target), "-std=c++17", "-O3", "--fmad=false"),
                *("-Xcompiler", "-fPIC,-fvisibility=hidden", "-cudart=static", *codes),
                *(f"-DTORCH_TARGET_VERSION={STABLE_ABI}", "-DUSE_CUDA"),
                *(f"-I{ROOT / 'csrc'}", f"-I{torch / 'include'}"),
            ]
        )
        return str(target)


setup(
    packages=find_packages(".", include=["synpo_kernels*"]) + find_packages("python", include=["synpo*"]),
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExtension},
)
