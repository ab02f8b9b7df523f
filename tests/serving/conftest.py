"""One server of the demo model with two adapters, for all tests of a session."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from oracles.serving_process import Script, ServerProcess, save_adapter, serve

# A template with tools, which the demo's own does not have.
TOOLS_TEMPLATE = (
    "{{ bos_token }}{% if tools %}<|tools|>{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function.arguments.path }}{% endfor %}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="session")
def adapter_folders(tmp_path_factory) -> dict[str, Path]:
    """Two adapters with different ranks, scalings and modules."""
    folder = tmp_path_factory.mktemp("adapters")
    return {
        "one": save_adapter(folder / "one", 1),
        "two": save_adapter(
            folder / "two", 2, r=3, lora_alpha=24, target_modules=["q_proj", "down_proj"]
        ),
    }


@pytest.fixture(scope="session")
def server(tmp_path_factory, adapter_folders) -> Iterator[ServerProcess]:
    named = [f"--adapter={name}={folder}" for name, folder in adapter_folders.items()]
    log = tmp_path_factory.mktemp("log") / "server.log"
    with serve(log, "demo", *named, kind=Script) as running:
        yield running


@pytest.fixture(scope="session")
def full(request) -> bool:
    """Whether the long forms of the tests are asked for: pytest --full tests/serving."""
    return request.config.getoption("--full")


@pytest.fixture(scope="session")
def tools_template() -> str:
    return TOOLS_TEMPLATE
