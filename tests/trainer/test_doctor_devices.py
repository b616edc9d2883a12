"""`trainer doctor`: accelerators and drivers, from what torch, the PCI bus and nvidia-smi say."""

from __future__ import annotations

from pathlib import Path

import pytest
from faults import only

from trainer.doctor import Setting
from trainer.doctor import devices as doctor_devices
from trainer.doctor.devices import Device, Driver, Torch, judge_devices, judge_driver
from trainer.load import load
from trainer.world import World

GB = 10**9
TWO = [Device("H100", 80 * GB, 79 * GB), Device("H100", 80 * GB, 79 * GB)]
CPU = Torch("2.14.1+cpu")
CUDA = Torch("2.14.1+cu130", cuda="13.0", driver_cuda=13010, devices=TWO)
HERE = Driver(2, "works", "580.65.06")
NONE = Driver(0, "absent")


def setting(*overrides: str, ranks: int = 1) -> Setting:
    world = World(0, ranks, 0, ranks, launched=ranks > 1)
    return Setting(Path("runs"), world, load("quickstart", overrides) if overrides else None)


@pytest.mark.parametrize(
    ("torch", "driver", "expected", "said"),
    [
        (CPU, NONE, "ok", "none needed: no NVIDIA device here (torch is built without CUDA)"),
        (Torch("2", cuda="13.0"), NONE, "ok", "none needed: no NVIDIA device here (torch is built for CUDA 13.0)"),
        (CUDA, HERE, "ok", "NVIDIA 580.65.06 for CUDA up to 13.1; torch is built for CUDA 13.0"),
        (CPU, HERE, "problem", "NVIDIA 580.65.06, but torch 2.14.1+cpu is built without CUDA"),
        (
            Torch("2", cuda="13.0", driver_cuda=12040),
            HERE,
            "problem",
            "up to 12.4; torch is built for CUDA 13",
        ),
        (Torch("2", cuda="12.8", driver_cuda=12040), HERE, "ok", "for CUDA up to 12.4; torch is built for CUDA 12.8"),
        (Torch("2", cuda="13.0"), HERE, "problem", "but its library libcuda.so.1 is not found"),
        (Torch("2", cuda="13.0"), Driver(8, "absent"), "problem", "8 NVIDIA device(s) on the bus, but no driver"),
        (CUDA, Driver(2, "absent"), "ok", "NVIDIA (nvidia-smi is not there) for CUDA up to 13.1"),
        (CUDA, Driver(2, "fails", "Unable to determine"), "problem", "nvidia-smi fails: Unable to determine"),
        (Torch("2", hip="6.4"), NONE, "ok", "torch is built for ROCm 6.4"),
    ],
)
def test_driver_devices_and_torch_must_belong_together(torch: Torch, driver: Driver, expected: str, said: str) -> None:
    check = only(judge_driver(torch, driver))
    assert (check.status, check.remedy is None) == (expected, expected == "ok")
    assert said in check.found


@pytest.mark.parametrize(
    ("torch", "driver", "where", "expected", "said"),
    [
        (CPU, NONE, setting(), "ok", "the CPU, no accelerator; torch 2.14.1+cpu"),
        (CUDA, HERE, setting(), "ok", "2 × H100, 79 GB free of 80 GB; torch 2.14.1+cu130"),
        (CUDA, HERE, setting("train.device=cpu"), "ok", "the CPU (train.device)"),
        (Torch("2", mps=True), NONE, setting(), "ok", "Apple GPU (mps)"),
        (CPU, NONE, setting("train.device=cuda"), "problem", "train.device is cuda, but there is only cpu"),
        (CUDA, HERE, setting(ranks=4), "problem", "4 processes on this node want one each"),
        (Torch("2", cuda="13.0", said=["driver too old"]), HERE, setting(), "problem", "the devices: driver too old"),
        (Torch("2", devices=[*TWO, Device("H100", error="CUDA error: out of memory")]), HERE, setting(), "problem",
         "device 2: CUDA error: out of memory"),
        (Torch("2", devices=[*TWO, Device("H100", 80 * GB, 20 * GB)]), HERE, setting(), "warning", "something else is"),
        (Torch("2", devices=TWO, said=["sm_70 is not compatible"]), HERE, setting(), "warning", "torch says: sm_70"),
    ],
)  # fmt: skip
def test_devices_are_judged(torch: Torch, driver: Driver, where: Setting, expected: str, said: str) -> None:
    check = only(judge_devices(torch, driver, where))
    assert (check.status, check.remedy is None) == (expected, expected == "ok")
    assert said in check.found


def test_hidden_devices_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    check = only(judge_devices(Torch("2", cuda="13.0"), HERE, setting()))
    assert check.status == "warning" and check.found == "CUDA_VISIBLE_DEVICES='' hides every device"


def pci_bus(folder: Path, *devices: tuple[str, str]) -> Path:
    for number, (vendor, kind) in enumerate(devices):
        own = folder / f"0000:00:{number:02}.0"
        own.mkdir(parents=True)
        (own / "vendor").write_text(f"{vendor}\n")
        (own / "class").write_text(f"{kind}\n")
    return folder


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("echo 580.65.06\necho 580.65.06", Driver(2, "works", "580.65.06")),
        ("echo NVIDIA-SMI has failed\nexit 9", Driver(2, "fails", "NVIDIA-SMI has failed")),
        ("exec sleep 60", Driver(2, "hangs", "no answer within 0.3 s")),
    ],
)
def test_nvidia_smi_works_fails_or_hangs(
    script: str, expected: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound_card, other_make = ("0x10de", "0x040300"), ("0x8086", "0x030000")
    bus = pci_bus(tmp_path / "bus", ("0x10de", "0x030200"), ("0x10de", "0x030000"), sound_card, other_make)
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(doctor_devices, "SMI_SECONDS", 0.3 if expected.smi == "hangs" else 10.0)
    assert doctor_devices.look(bus) == expected
    if expected.smi == "hangs":  # torch, which would hang with it, is not started
        check = only(doctor_devices.devices(setting(), seconds=0.0))
        assert (check.name, check.status) == ("driver", "problem")


def test_without_nvidia_smi_the_bus_is_all_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor_devices.look(pci_bus(tmp_path / "bus", ("0x10de", "0x030200"))) == Driver(1, "absent")
    assert doctor_devices.look(tmp_path / "missing") == NONE


@pytest.mark.parametrize(
    ("torch", "seconds", "said"),
    [
        ("import time; time.sleep(60)", 0.5, "torch did not say what it sees within 0.5 s"),
        (
            "raise ImportError('libtorch.so: cannot open')",
            60,
            "torch can't be imported: ImportError: libtorch.so",
        ),
    ],
)
def test_a_torch_that_hangs_or_is_broken_is_a_problem(
    torch: str, seconds: float, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch.py").write_text(torch)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(doctor_devices, "look", lambda: NONE)
    check = only(doctor_devices.devices(setting(), seconds))
    assert check.status == "problem" and said in check.found


def test_what_torch_sees_here_is_what_it_says() -> None:
    import torch

    seen = doctor_devices.see()
    assert (seen.version, seen.cuda) == (torch.__version__, torch.version.cuda)
    assert len(seen.devices) == torch.cuda.device_count()
    assert only(judge_driver(seen, doctor_devices.look())).status == ("problem" if seen.said else "ok")
