"""`import keyhole` needs torch, numpy and scipy only, and is then complete."""

from __future__ import annotations

import subprocess
import sys

BLOCKED = (
    "pydantic",
    "typer",
    "rich",
    "jinja2",
    "matplotlib",
    "datasets",
    "skimage",
    "sklearn",
    "torchmetrics",
    "safetensors",
    "tomli_w",
    "jaxtyping",
    "flwr",
    "opacus",
)
HEAD = f"""
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED!r}:
            raise ImportError(f"blocked: {{name}}")

sys.meta_path.insert(0, Blocker())
"""


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=300)


def test_keyhole_is_imported_without_optional_packages() -> None:
    done = python(HEAD + "import keyhole\nassert keyhole.__version__\nprint(*(c.name for c in keyhole.DEFENSES))")
    assert done.returncode == 0, done.stderr
    assert "random_masking" in done.stdout


def test_the_blocker_blocks() -> None:
    done = python(HEAD + "import pydantic")
    assert done.returncode != 0
    assert "blocked: pydantic" in done.stderr


def test_attacks_and_defenses_can_be_built_after_importing_keyhole_alone() -> None:
    done = python(
        HEAD
        + "import keyhole\n"
        + "for registry in (keyhole.ATTACKS, keyhole.DEFENSES):\n"
        + "    for card in registry:\n"
        + "        registry.build(card.name)\n"
    )
    assert done.returncode == 0, done.stderr


def test_opacus_is_needed_for_epsilon_alone_and_its_absence_is_said() -> None:
    done = python(
        HEAD
        + "from keyhole.defenses.dp_sgd import DPSGD\n"
        + "from keyhole.errors import ConfigError\n"
        + "assert 0.1 < DPSGD().success_bound(0.1, 1) < 1\n"
        + "print(DPSGD().remark({'noisy gradients': [1.0]}))\n"
        + "try:\n    DPSGD().privacy(1)\nexcept ConfigError as error:\n    print('refused:', error)\n"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("keyhole[dp]") == 2
    assert "noise multiplier 1" in done.stdout
    assert "refused:" in done.stdout
