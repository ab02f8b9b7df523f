"""The memory that a process can get on the host, on Linux."""

import os

import pytest

from fastlora.runtime import host_memory
from fastlora.runtime.host_memory import free_host_memory


@pytest.fixture
def system(monkeypatch, tmp_path):
    """A function that writes the files of a machine with 1,000 KiB to give, and of a container."""
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemFree: 10 kB\nMemAvailable: 1000 kB\n")
    monkeypatch.setattr(host_memory, "_MEMINFO", meminfo)
    monkeypatch.setattr(host_memory, "_GROUP", tmp_path)

    def write(**files: str) -> None:
        for name, text in files.items():
            (tmp_path / f"memory.{name}").write_text(text)

    return write


STAT = "anon 5\ninactive_file 300\nactive_file 7\n"


@pytest.mark.parametrize(
    ("limit", "free"),
    [("max\n", 1000 * 1024), ("5000\n", 5000 - 4000 + 300), ("4000000\n", 1000 * 1024), ("3\n", 0)],
)
def test_a_containers_limit_counts(limit, free, system):
    system(max=limit, current="4000\n", stat=STAT)
    assert free_host_memory() == free


def test_without_a_container_the_system_counts(system):
    assert free_host_memory() == 1000 * 1024


def test_systems_without_linuxs_files(system, monkeypatch, tmp_path):
    (tmp_path / "meminfo").unlink()
    in_all = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert free_host_memory() == in_all // 2
    monkeypatch.delattr(os, "sysconf")
    assert free_host_memory() > in_all
