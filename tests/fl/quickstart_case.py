"""The example app, with its commented lines put in or not, run in this process."""

from __future__ import annotations

import importlib
import shutil
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flower import LoopGrid, context
from flwr.app import Context, Message

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "quickstart"


@contextmanager
def quickstart(folder: Path, *lines: str) -> Iterator[Path]:
    """A copy of the app in ``folder`` with the lines of these kinds (``defend``, ``record``, ``secrets``) put in."""
    app = folder / "quickstart"
    shutil.copytree(EXAMPLE / "quickstart", app, ignore=shutil.ignore_patterns("__pycache__"))
    for path in app.glob("*.py"):
        text = path.read_text()
        for kind in lines:
            text = text.replace(f"# {kind}: ", "")
        path.write_text(text)
    sys.path.insert(0, str(folder))
    try:
        yield folder
    finally:
        sys.path.remove(str(folder))
        for name in [name for name in sys.modules if name.partition(".")[0] == "quickstart"]:
            del sys.modules[name]


def run(folder: Path, nodes: int, **changes: Any) -> Any:
    """Train; returns the server's module. Output goes below ``folder``."""
    config = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    config |= {name.replace("_", "-"): value for name, value in changes.items()}
    config |= {"transcript": str(folder / "transcript"), "secrets": str(folder / "secrets")}
    client = importlib.import_module("quickstart.client_app")
    server = importlib.import_module("quickstart.server_app")

    def train(message: Message, where: Context) -> Message:
        where.run_config, where.node_config = config, {**where.node_config, "num-partitions": nodes}
        return client.app(message, where)

    own = context(0)
    own.run_config = config
    server.app(LoopGrid(train, nodes), own)
    return server
