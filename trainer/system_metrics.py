"""CPU, memory and GPU use of the machine and of a process with all its children, under MLflow's own names."""

from __future__ import annotations

import importlib
from typing import Any

import psutil

MEGABYTE = 1e6


class SystemMetrics:
    """Samples the machine and the process tree below `pid`. Shares of CPU are since the sample before."""

    def __init__(self, pid: int) -> None:
        self._tree: dict[int, psutil.Process] = {}
        self._pid = pid
        self._network = psutil.net_io_counters()
        self._gpus = _gpus()
        self.sample()

    def sample(self) -> dict[str, float]:
        """Values by MLflow's names; `process_*` is the training with its data workers.

        Memory is in megabytes, with pages shared by several processes counted in each; 100 % of
        `process_cpu_percentage` is one core.
        """
        memory = psutil.virtual_memory()
        network = psutil.net_io_counters()
        values = {
            "system/cpu_utilization_percentage": psutil.cpu_percent(),
            "system/system_memory_usage_megabytes": memory.used / MEGABYTE,
            "system/system_memory_usage_percentage": memory.percent,
            **self._process_values(),
        }
        if network and self._network:
            values["system/network_receive_megabytes"] = (network.bytes_recv - self._network.bytes_recv) / MEGABYTE
            values["system/network_transmit_megabytes"] = (network.bytes_sent - self._network.bytes_sent) / MEGABYTE
        for number, (library, handle) in enumerate(self._gpus):
            try:
                used = library.nvmlDeviceGetMemoryInfo(handle)
                share = library.nvmlDeviceGetUtilizationRates(handle).gpu
            except library.NVMLError:  # a virtual GPU doesn't tell everything
                continue
            values[f"system/gpu_{number}_utilization_percentage"] = share
            values[f"system/gpu_{number}_memory_usage_megabytes"] = used.used / MEGABYTE
            values[f"system/gpu_{number}_memory_usage_percentage"] = 100 * used.used / used.total
        return values

    def _process_values(self) -> dict[str, float]:
        try:
            root = self._tree.get(self._pid) or psutil.Process(self._pid)
            members = [root, *root.children(recursive=True)]
        except psutil.Error:  # it has ended, or is not ours to look at
            return {}
        # Process objects are kept: each remembers the CPU time at the sample before
        self._tree = {member.pid: self._tree.get(member.pid, member) for member in members}
        cpu, resident = 0.0, 0
        for member in self._tree.values():
            try:
                with member.oneshot():
                    cpu += member.cpu_percent()
                    resident += member.memory_info().rss
            except psutil.Error:  # a worker that ended since the list was made
                continue
        return {"system/process_cpu_percentage": cpu, "system/process_memory_megabytes": resident / MEGABYTE}


def _gpus() -> list[tuple[Any, Any]]:
    try:
        library = importlib.import_module("pynvml")
    except ModuleNotFoundError:
        return []
    try:
        library.nvmlInit()
    except library.NVMLError:  # the library is there, a driver is not
        return []
    return [(library, library.nvmlDeviceGetHandleByIndex(index)) for index in range(library.nvmlDeviceGetCount())]
