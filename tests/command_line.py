"""The command line in this process, as several tests call it."""

from __future__ import annotations

import warnings

import pytest

from keyhole.cli import main


def run(*arguments: object) -> int:
    """Its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["keyhole", *map(str, arguments)])
        patch.setattr("warnings.showwarning", warnings.showwarning)  # put back afterwards, as it is replaced
        with pytest.raises(SystemExit) as left:
            main()
        return int(left.value.code or 0)
