"""How ``qlinear doctor`` and the benchmarks name what they ran on."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch

from qlinear import doctor


@pytest.mark.parametrize(
    ("cpuinfo", "wanted"),
    [
        ("processor\t: 0\nmodel\t\t: 17\nmodel name\t: AMD EPYC 9354P\n\nmodel name\t: another\n", "AMD EPYC 9354P"),
        ("processor\t: 0\nCPU part\t: 0xd4f\n", "what Python says"),
        ("model name\t:\nstepping\t: 1\n", "what Python says"),
        (None, "what Python says"),
    ],
    ids=["linux", "linux-without-a-name", "empty-name", "not-linux"],
)
def test_the_name_of_a_cpu(cpuinfo: str | None, wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "processor", lambda: "what Python says")
    if cpuinfo is not None:
        (tmp_path / "cpuinfo").write_text(cpuinfo)
    assert doctor._cpu_name(tmp_path / "cpuinfo") == wanted


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("AMD EPYC", "cpu: AMD EPYC, x86_64, "), ("", "cpu: x86_64, "), ("x86_64", "cpu: x86_64, ")],
    ids=["name", "no-name", "name-of-the-architecture"],
)
def test_a_cpu_among_the_devices(name: str, wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(doctor, "_cpu_name", lambda: name)
    capability = torch.backends.cpu.get_cpu_capability()
    assert doctor.devices()[0] == f"{wanted}{capability}, {torch.get_num_threads()} threads"
