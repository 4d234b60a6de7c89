"""Build of the C++ extension `synpo_kernels._C`; everything else about the package is in pyproject.toml.

Nothing is compiled when this file is imported, and torch is never imported or downloaded: its headers and libraries are
found on disk, in this interpreter's site-packages even when the build runs in pip's isolated environment. The tensor ops
use libtorch's stable ABI, so one binary serves every torch from 2.11 on.

Where there is no C++ compiler, the package is installed without the extension, a warning says so (pip 26 shows it; older ones
with -v), and the torch code path does the work: same results, slower. Where there is one, what else is missing can be had: then
no extension is an error, which every pip shows.

    SYNPO_REQUIRE_EXT=0     never an error: a warning
    SYNPO_REQUIRE_EXT=1     always an error, without a compiler too
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import os
import re
import shutil
import sys
import sysconfig
import textwrap
import warnings
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import PlatformError

ROOT = Path(__file__).resolve().parent
STABLE_ABI = "0x020b000000000000"  # torch 2.11, the oldest release the tensor ops may meet


def required() -> bool:
    """Whether a package without the extension is an error."""
    value = os.environ.get("SYNPO_REQUIRE_EXT") or ("0" if shutil.which(compiler()) is None else "1")
    if value not in ("0", "1"):
        raise SystemExit(f"synpo: SYNPO_REQUIRE_EXT={value!r}; expected 0 or 1")
    return value == "1"


def find_torch() -> tuple[Path, str] | None:
    """Folder and version of the installed torch. pip's build isolation hides site-packages from sys.path, it does not move it."""
    paths = [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    spec = importlib.machinery.PathFinder.find_spec("torch", paths)
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent
    found = re.search(r"__version__ = '([^']+)'", (folder / "version.py").read_text())
    return (folder, found[1]) if found else None


def compiler() -> str:
    return (os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++").split()[0]


def fingerprint() -> str:
    """Of the sources, so that a binary is not taken for that of others (synpo_kernels/_ext.py compares)."""
    digest = hashlib.sha256()
    for path in sorted(path for kind in ("*.cpp", "*.h") for path in (ROOT / "csrc").glob(kind)):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


class BuildExtension(build_ext):
    """Finds torch, pybind11 and a compiler, compiles; a failure is an error, or leaves a pure-Python package (`required`)."""

    def build_extension(self, ext: Extension) -> None:
        insist = required()
        try:
            self.configure(ext)
            super().build_extension(ext)
        except Exception as error:
            if insist:
                raise PlatformError(
                    f"synpo: the C++ extension cannot be built: {textwrap.shorten(str(error), 300)}. To install without it (same "
                    "results, slower), set SYNPO_REQUIRE_EXT=0 in the environment"
                ) from error
            Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)  # an earlier build, of other sources
            warnings.warn(
                f"synpo: the C++ extension was not built: {textwrap.shorten(str(error), 120)}. The torch code path will be used: "
                "same results, slower. pip install -v shows the compiler's output.",
                stacklevel=2,
            )
            ext.optional = True  # setuptools then leaves the missing file out of the wheel and of an editable install

    def copy_extensions_to_source(self) -> None:
        """After a build in place: the checkout holds the binary just built, or none."""
        for ext in self.extensions:
            (ROOT / self.get_ext_filename(ext.name)).unlink(missing_ok=True)
        super().copy_extensions_to_source()

    def configure(self, ext: Extension) -> None:
        found = find_torch()
        if found is None:
            raise PlatformError(
                "there is no torch in this environment; first install it (pip install torch), then again"
            )
        if shutil.which(compiler()) is None:
            raise PlatformError(f"there is no C++ compiler ({compiler()})")
        if not Path(sysconfig.get_path("include"), "Python.h").is_file():
            raise PlatformError("Python's headers are missing; install them (Debian, Ubuntu: apt install python3-dev)")
        try:
            import pybind11
        except ImportError:
            raise PlatformError(
                'pybind11 is missing; with --no-build-isolation first pip install "setuptools>=77" wheel "pybind11>=2.13"'
            ) from None

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
            ("SYNPO_COMPILE_FLAGS", f'"{" ".join(ext.extra_compile_args)}"'),
            ("SYNPO_SOURCES", f'"{fingerprint()}"'),
        ]


sources, headers = ([f"csrc/{path.name}" for path in sorted((ROOT / "csrc").glob(kind))] for kind in ("*.cpp", "*.h"))
setup(
    packages=find_packages(".", include=["synpo_kernels*"]) + find_packages("python", include=["synpo*"]),
    ext_modules=[Extension("synpo_kernels._C", sources, depends=[*headers, "setup.py"], language="c++")],
    cmdclass={"build_ext": BuildExtension},
)
