"""What Flower's own client mods do to updates, for the table in docs/flower.md.

Run ``python benchmarks/flower_mods.py``; needs ``pip install keyhole[flower]`` and about half a minute.
"""

from __future__ import annotations

import os
from importlib.metadata import version

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # read when Flower is imported

import torch
from flwr.clientapp.mod import LocalDpMod, adaptiveclipping_mod, fixedclipping_mod, message_size_mod
from torch import nn

from keyhole.core.defense import chain
from keyhole.defenses.clip import Clip
from keyhole.defenses.gaussian_noise import GaussianNoise
from keyhole.fl import DefenseMod, check_mod


class Net(nn.Module):
    """A layer of each kind that mods treat differently, and a parameter without dimensions, as a temperature is."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(144, 3)
        self.temperature = nn.Parameter(torch.tensor(1.0))


CLIP, EPSILON, DELTA = 1.0, 1.0, 1e-5
SENSITIVITY = 0.01


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net, norm = Net(), {"clipping_norm": CLIP}
    ours = DefenseMod(chain(Clip(norm=CLIP), GaussianNoise(std=0.0484)), net)
    cases = {
        "fixedclipping_mod": (fixedclipping_mod, norm, 200),
        "adaptiveclipping_mod": (adaptiveclipping_mod, norm, 50),
        f"LocalDpMod({CLIP}, {SENSITIVITY}, {EPSILON}, {DELTA})": (
            LocalDpMod(CLIP, SENSITIVITY, EPSILON, DELTA), {}, 200
        ),
        "message_size_mod": (message_size_mod, {}, 20),
        "DefenseMod(clip, gaussian_noise)": (ours, {}, 60),
    }  # fmt: skip
    print(f"flwr {version('flwr')}")
    for name, (mod, config, messages) in cases.items():
        print(f"\n# {name}\n")
        print(check_mod(mod, net, config=config, messages=messages))


if __name__ == "__main__":
    main()
