"""What the figures were measured on, and the state that it is put into first: one thread, memory that is kept.

glibc hands freed memory back to the system and asks for it again, by a rule that depends on what was freed before: the
same step then takes the page faults of 0 or of 2,000 pages, by turns, and twice the time. Everything that is measured
here runs with freed memory kept, as the allocators of long-running programs do.
"""

from __future__ import annotations

import ctypes
import datetime
import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch

__all__ = ["describe_machine", "steady_machine"]

PACKAGES = ("twloss", "torch", "torchmetrics", "torcheval", "pytorch-ignite")


# From glibc's malloc.h: above how many free bytes memory is handed back, and how many blocks may be mappings.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def steady_machine() -> None:
    """One thread, and no memory handed back to the system."""
    torch.set_num_threads(1)
    if _has_glibc():
        glibc = ctypes.CDLL(None)
        glibc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        glibc.mallopt(M_MMAP_MAX, 0)


def describe_machine(device: torch.device) -> dict[str, str]:
    """The device, the CPU, the threads, the versions and the date, in words."""
    facts = {
        "date": datetime.date.today().isoformat(),
        "CPU": f"{_cpu_name()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
        "threads": str(torch.get_num_threads()),
        "allocator": "glibc, freed memory kept" if _has_glibc() else "the system's",
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "packages": ", ".join(f"{name} {_version(name)}" for name in PACKAGES),
    }
    gpu = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}" if device.type == "cuda" else "none used"
    return {**facts, "GPU": gpu}


def _has_glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"


def _version(name: str) -> str:
    return torch.__version__ if name == "torch" else version(name)


def _cpu_name() -> str:
    """The name that Linux knows, with the family and model, since a virtual machine's name may say little."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    pairs = (line.partition(":") for line in lines)
    facts = {key.strip(): value.strip() for key, _, value in pairs}
    name = facts.get("model name", platform.machine())
    return f"{name} (family {facts['cpu family']}, model {facts['model']})" if "cpu family" in facts else name
