"""`trainer doctor`: accelerators and their driver. `python -m trainer.doctor.devices` prints what torch sees.

A process of its own: a broken driver hangs whoever asks, with Python's lock held.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from trainer.doctor import Check, Setting, listed, ok, problem, size, warning

SMI_SECONDS = 10.0
"""nvidia-smi takes one or two on a node with eight devices; a driver in trouble makes it hang."""
FREE_SHARE = 0.9
"""Of a device's memory; driver and context take less than the rest, so somebody else is on it."""
_NVIDIA = "0x10de"
_DISPLAY = "0x03"
"""Class of PCI devices that GPUs belong to."""


@dataclass(frozen=True)
class Device:
    """A CUDA or ROCm device as torch sees it; bytes."""

    name: str
    total: int = 0
    free: int = 0
    error: str = ""
    """Why it can't be used."""


@dataclass(frozen=True)
class Torch:
    """What torch was built for and what it finds."""

    version: str
    cuda: str | None = None
    """CUDA version it was built for, e.g. `13.0`."""
    hip: str | None = None
    driver_cuda: int | None = None
    """Newest CUDA version of the driver, e.g. 13000; None without its library."""
    mps: bool = False
    devices: list[Device] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    """Warnings of torch while it looked."""


@dataclass(frozen=True)
class Driver:
    """What the machine shows without torch."""

    cards: int
    """NVIDIA devices on the PCI bus; a container sees them also where it may not use them."""
    smi: Literal["absent", "works", "fails", "hangs"]
    said: str = ""
    """Version of the driver, or what nvidia-smi complains of."""


def devices(setting: Setting, seconds: float) -> list[Check]:
    """The lines `devices` and `driver`."""
    driver = look()
    if driver.smi == "hangs":  # torch would hang, too
        return judge_driver(Torch("?"), driver)
    command = [sys.executable, "-m", "trainer.doctor.devices"]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        remedy = "a slow disk (--timeout SECONDS gives it longer), or a driver that hangs: look at dmesg"
        return problem("devices", f"torch did not say what it sees within {seconds:g} s", remedy)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return problem("devices", f"torch can't be imported: {last}", "install it anew: see `packages`")
    said = json.loads(done.stdout.splitlines()[-1])
    torch = Torch(**{**said, "devices": [Device(**entry) for entry in said["devices"]]})
    return [*judge_devices(torch, driver, setting), *judge_driver(torch, driver)]


def judge_devices(torch: Torch, driver: Driver, setting: Setting) -> list[Check]:
    """Number, memory and state of what a run would compute on."""
    name, wanted = "devices", setting.config.train.device if setting.config else "auto"
    kind = "mps" if torch.mps else "cpu"
    kind = "cuda" if torch.devices else kind
    if wanted in ("cuda", "mps") and wanted != kind:
        return problem(
            name, f"train.device is {wanted}, but there is only {kind}", "see `driver`; or train.device=auto"
        )
    if not torch.devices or wanted == "cpu":
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        if driver.smi == "works" and hidden in ("", "-1") and wanted != "cpu":
            return warning(name, f"CUDA_VISIBLE_DEVICES={hidden!r} hides every device", "unset CUDA_VISIBLE_DEVICES")
        if driver.smi == "works" and torch.cuda and wanted != "cpu":
            said = f": {torch.said[0]}" if torch.said else ""
            return problem(name, f"torch {torch.version} finds none of the devices{said}", "see `driver`, and dmesg")
        what = "Apple GPU (mps)" if kind == "mps" and wanted != "cpu" else "the CPU, no accelerator"
        return ok(name, f"{what if wanted != 'cpu' else 'the CPU (train.device)'}; torch {torch.version}")
    broken = [f"device {index}: {device.error}" for index, device in enumerate(torch.devices) if device.error]
    if broken:
        return problem(name, listed(broken, 2), "nvidia-smi shows who holds it; reset or leave out that device")
    free = min(device.free for device in torch.devices)
    total = min(device.total for device in torch.devices)
    found = f"{len(torch.devices)} × {torch.devices[0].name}, {size(free)} free of {size(total)}; torch {torch.version}"
    ranks = setting.world.local_size
    if ranks > len(torch.devices):
        remedy = f"start {len(torch.devices)} processes per node, or ask for {ranks} devices"
        return problem(name, f"{found}: {ranks} processes on this node want one each", remedy)
    if torch.said:
        return warning(name, f"{found}; torch says: {torch.said[0]}", "take a build of torch that knows this device")
    if free < FREE_SHARE * total:
        return warning(name, f"{found}: something else is on one of them", "nvidia-smi shows who; end it, or share")
    return ok(name, found)


def judge_driver(torch: Torch, driver: Driver) -> list[Check]:
    """Whether driver, devices and the build of torch belong together."""
    name, built = "driver", f"torch is built for CUDA {torch.cuda}" if torch.cuda else "torch is built without CUDA"
    if driver.smi in ("fails", "hangs"):
        remedy = "reload or reinstall the NVIDIA driver, restart the machine; dmesg says more"
        return problem(name, f"nvidia-smi {driver.smi}{f': {driver.said}' if driver.said else ''}", remedy)
    if torch.hip:
        return ok(name, f"torch is built for ROCm {torch.hip}")
    if driver.smi == "absent" and not torch.devices:
        if not driver.cards:
            return ok(name, f"none needed: no NVIDIA device here ({built})")
        remedy = "install the driver; a container: start it with --gpus all (Kubernetes: resources nvidia.com/gpu)"
        return problem(name, f"{driver.cards} NVIDIA device(s) on the bus, but no driver", remedy)
    found = f"NVIDIA {driver.said}" if driver.smi == "works" else "NVIDIA (nvidia-smi is not there)"
    if not torch.cuda:
        remedy = "install a build of torch with CUDA, see pytorch.org/get-started"
        return problem(name, f"{found}, but torch {torch.version} is built without CUDA", remedy)
    if torch.driver_cuda is None:
        remedy = "a container: NVIDIA_DRIVER_CAPABILITIES=compute,utility; else reinstall the driver"
        return problem(name, f"{found}, but its library libcuda.so.1 is not found", remedy)
    major, minor = torch.driver_cuda // 1000, torch.driver_cuda % 1000 // 10
    found += f" for CUDA up to {major}.{minor}; {built}"
    if major < int(torch.cuda.partition(".")[0]):  # within a major version older drivers do
        return problem(name, found, f"update the driver, or install a build of torch for CUDA {major}")
    return ok(name, found)


def look(pci: Path = Path("/sys/bus/pci/devices")) -> Driver:
    """NVIDIA devices on the bus, and what nvidia-smi says."""
    cards = 0
    for folder in pci.glob("*"):
        vendor, kind = ((folder / file).read_text().strip() for file in ("vendor", "class"))
        cards += vendor == _NVIDIA and kind.startswith(_DISPLAY)
    program = shutil.which("nvidia-smi")
    if program is None:
        return Driver(cards, "absent")
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=SMI_SECONDS
        )
    except subprocess.TimeoutExpired:
        return Driver(cards, "hangs", f"no answer within {SMI_SECONDS:g} s")
    lines = [*done.stdout.split("\n"), *done.stderr.split("\n")]
    said = next((line.strip() for line in lines if line.strip()), "")
    return Driver(cards, "fails" if done.returncode else "works", said)


def see() -> Torch:
    """What torch finds here; makes a context on each device, which takes a second each."""
    import torch

    version: Any = torch.version
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = [_device(index) for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    said = [" ".join(str(entry.message).split()) for entry in caught if entry.category is UserWarning]
    mps = torch.backends.mps.is_available()
    return Torch(torch.__version__, version.cuda, version.hip, _driver_cuda(), mps, found, said)


def _device(index: int) -> Device:
    import torch

    name = torch.cuda.get_device_name(index)
    try:
        free, total = torch.cuda.mem_get_info(index)
    except RuntimeError as error:  # held by somebody else, or broken; the others are still looked at
        return Device(name, error=str(error).partition("\n")[0])
    return Device(name, total, free)


def _driver_cuda() -> int | None:
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:  # no driver
        return None
    number = ctypes.c_int()
    return number.value if library.cuDriverGetVersion(ctypes.byref(number)) == 0 else None


if __name__ == "__main__":
    print(json.dumps(asdict(see())))
