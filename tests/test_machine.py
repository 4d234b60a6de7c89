"""The processor's name and instruction sets, as Linux tells them on x86 and on Arm, and where it tells nothing."""

import os
import platform

import pytest

from synpo import machine

X86 = "processor\t: 0\nmodel name\t: AMD EPYC\nflags\t\t: fpu avx avx2 amx_tile avx512_bf16 avx512f\nbogomips: 1\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd sve bf16 i8mm\nCPU implementer\t: 0x41\n"


@pytest.fixture
def told(monkeypatch, tmp_path):
    """Have the system say a text of its processor; None: nothing."""

    def say(text):
        machine._facts.cache_clear()
        if text is not None:
            (tmp_path / "cpuinfo").write_text(text)
        monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")

    yield say
    machine._facts.cache_clear()


def test_x86(told):
    told(X86 + "\n" + X86.replace("EPYC", "other").replace("avx2", "x"))
    assert machine.cpu_name() == "AMD EPYC"
    assert machine.instruction_sets() == ["avx2", "avx512f", "avx512_bf16", "amx_tile"]
    assert machine.cpu() == f"AMD EPYC, {os.cpu_count()} cores, avx2 avx512f avx512_bf16 amx_tile"


@pytest.mark.parametrize(("text", "sets"), [(ARM, ["asimd", "bf16", "sve"]), (None, [])])
def test_a_system_that_names_no_model(told, monkeypatch, text, sets):
    told(text)
    monkeypatch.setattr(platform, "processor", lambda: "")
    assert machine.cpu_name() == platform.machine()
    assert machine.instruction_sets() == sets
    assert machine.cpu().startswith(f"{platform.machine()}, {os.cpu_count()} cores")
