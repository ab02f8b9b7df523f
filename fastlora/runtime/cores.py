"""usable_cores(): how many cores this process may use."""

import os


def usable_cores() -> int:
    """Cores of the machine, or of the process's affinity where the system has one."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS and Windows
    return len(affinity(0)) if affinity else os.cpu_count() or 1
