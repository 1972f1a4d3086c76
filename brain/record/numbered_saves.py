"""The saves of a run and the journals behind them, by number. No number is used twice."""

import shutil
from pathlib import Path


class NumberedSaves:
    """What lies in a folder: ``N/``, the Nth save, and ``N.journal``, what happened since."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, number: int) -> Path:
        """Where a save is."""
        return self.folder / str(number)

    def journal(self, number: int) -> Path:
        """Where the journal behind a save is; behind save 0, which there is not, the beginning."""
        return self.folder / f"{number}.journal"

    def saves(self) -> list[int]:
        """Numbers of the saves, newest first."""
        return sorted(self._numbers(""), reverse=True)

    def journals(self) -> list[int]:
        """Numbers of the journals, oldest first."""
        return sorted(self._numbers(".journal"))

    def unused(self) -> int:
        """A number above all others."""
        return max([*self.saves(), *self.journals()], default=0) + 1

    def drop(self, *numbers: int) -> None:
        """Forgets saves and the journals behind them."""
        for number in numbers:
            shutil.rmtree(self.save(number), ignore_errors=True)
            self.journal(number).unlink(missing_ok=True)

    def drop_before(self, number: int) -> None:
        """Forgets everything older than a save."""
        self.drop(*(n for n in {*self.saves(), *self.journals()} if n < number))

    def clear_away(self) -> None:
        """Removes what a save that was killed has left."""
        for left in self.folder.glob(".*"):
            shutil.rmtree(left, ignore_errors=True)

    def _numbers(self, suffix: str) -> list[int]:
        names = (path.name for path in self.folder.iterdir())
        stems = (name.removesuffix(suffix) for name in names if name.endswith(suffix))
        return [int(stem) for stem in stems if stem.isdecimal() and len(stem) < 19]
