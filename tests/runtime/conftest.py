"""Fixtures of the tests of fastlora/runtime."""

import pytest


@pytest.fixture(autouse=True)
def own_triton_cache(monkeypatch, tmp_path_factory):
    """Triton's folder is one of the tests: compiling ahead sets it for the process, if it is not
    set."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "triton"))
