"""Keyhole measures how much private data can be recovered from what federated-learning clients share."""

from keyhole import attacks as attacks
from keyhole import defenses as defenses
from keyhole.core.defense import chain as chain
from keyhole.core.registry import ATTACKS, DEFENSES
from keyhole.core.threat import observe as observe
from keyhole.errors import KeyholeError

__version__ = "0.1.0"

__all__ = ["ATTACKS", "DEFENSES", "KeyholeError", "__version__", "chain", "observe"]
