"""The output folder: what was run, in files that survive an interruption and can be read without Keyhole.

``outcomes.jsonl`` is append-only, one line a trial; a line that was cut off is dropped with a warning and its trial
done again. Folders and files are for their owner alone: they may show what was recovered.
"""

from __future__ import annotations

import fcntl
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

import numpy as np
from torch import Tensor

from keyhole.core.trial import Outcome
from keyhole.errors import StoreError
from keyhole.experiment.spec import Study
from keyhole.solve.files import make_folder, tensors_as_bytes, write_whole

SECRETS = "secrets"


class Store:
    """One output folder. As a context manager it holds the folder, so that two commands cannot mix in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock: int | None = None

    @property
    def config(self) -> Path:
        """The resolved audit file."""
        return self.folder / "config.toml"

    @property
    def lines(self) -> Path:
        """The outcomes."""
        return self.folder / "outcomes.jsonl"

    @property
    def reconstructions(self) -> Path:
        """A folder of safetensors files, one a group."""
        return self.folder / "reconstructions"

    @property
    def checkpoints(self) -> Path:
        """A folder of unfinished groups; empty when a run is complete."""
        return self.folder / "checkpoints"

    def __enter__(self) -> Store:
        try:
            make_folder(self.folder)
            self._lock = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise StoreError(f"cannot write to the output folder '{self.folder}': {error.strerror}.") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise StoreError(
                f"another audit or training is running in '{self.folder}'; wait for it or choose another --out."
            ) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def claim(self, study: Study) -> None:
        """Make the folder this study's, or check that it is. Raises `StoreError` for another one's."""
        self.claim_config(study.to_toml())
        for folder in (self.reconstructions, self.checkpoints):
            make_folder(folder)

    def claim_config(self, wanted: str) -> None:
        """The same for any resolved file, given as text."""
        if self.config.exists():
            if not self.config.is_file() or self.config.read_text() != wanted:
                raise StoreError(
                    f"'{self.folder}' holds another experiment (its config.toml differs); choose another --out "
                    "or remove the folder."
                )
        elif self.lines.exists():
            raise StoreError(f"'{self.folder}' holds outcomes but no config.toml; choose another --out.")
        else:
            write_whole(self.config, wanted.encode())

    def tidy(self) -> None:
        """Remove what an unfinished run leaves: checkpoints and partial files may show what was recovered."""
        for leftover in (*self.checkpoints.iterdir(), *self.folder.rglob("*.partial")):
            leftover.unlink(missing_ok=True)

    def outcomes(self) -> dict[str, Outcome]:
        """All stored outcomes by trial hash. A half-written last line is left out, with a warning."""
        if not self.lines.exists():
            return {}
        data = self.lines.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            warnings.warn(f"{self.lines}: the last line was cut off; its trial is done again.", stacklevel=2)
        found: dict[str, Outcome] = {}
        for number, line in enumerate(data[:whole].decode(errors="replace").splitlines(), 1):
            try:
                outcome = Outcome.from_json(line)
            except ValueError as error:
                raise StoreError(
                    f"line {number} of '{self.lines}' cannot be read ({error}); "
                    "delete that line to have its trial done again."
                ) from error
            found.setdefault(outcome.trial.hash, outcome)
        return found

    def append(self, outcomes: Iterable[Outcome]) -> None:
        """Add outcomes, on disk when this returns. Only for whoever holds the folder."""
        if self.lines.exists():
            stored = self.lines.read_bytes()
            whole = stored.rfind(b"\n") + 1
            if whole < len(stored):  # what an interrupted run left of a line
                os.truncate(self.lines, whole)
        data = "".join(outcome.to_json() + "\n" for outcome in outcomes).encode()
        handle = os.open(self.lines, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(handle, "ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def keep_images(self, name: str, images: dict[str, Tensor]) -> None:
        """Write a safetensors file of images under the reconstructions folder, atomically."""
        write_whole(self.reconstructions / f"{name}.safetensors", tensors_as_bytes(images))

    def images(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray] | None]:
        """Stored reconstructions by trial hash, and the secrets by ``source/row`` where they were kept."""
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        found: dict[str, np.ndarray] = {}
        secrets: dict[str, np.ndarray] | None = None
        for path in sorted(self.reconstructions.glob("*.safetensors")):
            try:
                tensors = load_file(path)
            except SafetensorError as error:
                raise StoreError(f"'{path}' is damaged ({error}); remove it to do without its pictures.") from error
            if path.stem == SECRETS:
                secrets = dict(tensors)
            else:
                found.update(tensors)
        return found, secrets

    def write_text(self, name: str, text: str) -> Path:
        """Write a file of the report, atomically, and return its path."""
        path = self.folder / name
        write_whole(path, text.encode())
        return path
