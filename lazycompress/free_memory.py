"""How much memory a device has left."""

from __future__ import annotations

from pathlib import Path

import torch


def available(device: torch.device, sharing: int = 1) -> int | None:
    """Free bytes of a device for each of some processes that share it; None where that cannot be known."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    if device.type != "cpu":
        return None
    free_bytes = [size for size in (_of_the_machine(), _of_the_container()) if size is not None]
    return min(free_bytes) // sharing if free_bytes else None


def _of_the_machine() -> int | None:
    try:
        import psutil
    except ImportError:
        pass
    else:
        return int(psutil.virtual_memory().available)
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _of_the_container() -> int | None:
    """What the limit of a control group leaves; its page cache counts as used, so this is at least that much."""
    folder = Path("/sys/fs/cgroup")
    limit, used = (_lines(folder / name)[:1] for name in ("memory.max", "memory.current"))
    if not limit or not used or not limit[0].isdigit():
        return None
    cache = [int(line.split()[1]) for line in _lines(folder / "memory.stat") if line.startswith("inactive_file ")]
    return int(limit[0]) - int(used[0]) + sum(cache)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def size_of(count: float) -> str:
    """A number of bytes as one reads it."""
    if count >= 1e12:
        return f"{count / 1e12:.1f} TB"
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
