"""extra_module(): a module that an optional extra of the package installs."""

from importlib import import_module
from typing import Any

from fastlora.errors import lacks_extra


def extra_module(module: str, extra: str, purpose: str) -> Any:
    """Import and return a module, at the first use: `import fastlora` must not load it.

    Args:
        module: its name, "matplotlib.figure".
        extra: of the package, that installs it.
        purpose: what needs it, for the message.

    Raises:
        ModuleNotFoundError: it is not installed, or cannot be imported.
    """
    try:
        return import_module(module)
    except ImportError as error:
        # torch.utils.tensorboard names the package that it lacks.
        package = (error.name or module).partition(".")[0]
        raise lacks_extra(purpose, package, extra, error) from error
