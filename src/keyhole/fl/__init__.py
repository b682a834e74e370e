"""Keyhole inside Flower: defend a real app, record its traffic, check mods. The only folder that imports ``flwr``.

Needs ``pip install keyhole[flower]``.
"""

from keyhole.errors import ConfigError

try:
    import flwr.app  # noqa: F401
except ImportError as error:
    raise ConfigError("this needs Flower: pip install 'keyhole[flower]'.") from error

from keyhole.fl.check import check_mod
from keyhole.fl.facts import ModFacts
from keyhole.fl.mods import DefenseMod
from keyhole.fl.noise import ServerNoise
from keyhole.fl.recorder import Recorder, record_batches
from keyhole.fl.training import defended_training

__all__ = ["DefenseMod", "ModFacts", "Recorder", "ServerNoise", "check_mod", "defended_training", "record_batches"]
