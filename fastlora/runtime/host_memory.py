"""free_host_memory(): what this process can get."""

import os
from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_GROUP = Path("/sys/fs/cgroup")  # of a container that has a limit (cgroup version 2)


def free_host_memory() -> int:
    """Bytes that this process can get on the host, within its container's limit.

    Linux includes what its page cache would give back: after a large file was read, few pages are
    unused. Other systems report their memory in all, of which half counts. Where Python cannot ask
    (Windows), no limit is known, and the result is larger than any memory.
    """
    return max(0, min([_of_system(), *_of_container()]))


def _of_system() -> int:
    if _MEMINFO.exists():
        lines = [line.split() for line in _MEMINFO.read_text().splitlines()]
        found = [int(words[1]) for words in lines if words and words[0] == "MemAvailable:"]
        if found:
            return 1024 * found[0]  # the file counts in KiB
    if not hasattr(os, "sysconf"):
        return 2**62
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _of_container() -> list[int]:
    """The unused part of the container's limit, in a list that is empty if it has none ("max")."""
    try:
        limit, used = (int((_GROUP / f"memory.{x}").read_text()) for x in ("max", "current"))
        lines = [line.split() for line in (_GROUP / "memory.stat").read_text().splitlines()]
    except (OSError, ValueError):
        return []
    cached = [int(words[1]) for words in lines if words and words[0] == "inactive_file"]
    return [limit - used + sum(cached)]
