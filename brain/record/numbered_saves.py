"""The saves of a run and the journals after them, by number. No number is used twice."""

import shutil
from pathlib import Path


class NumberedSaves:
    """A folder with ``N/``, the Nth save, and ``N.journal``, what happened after it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, number: int) -> Path:
        """Where a save is."""
        return self.folder / str(number)

    def journal(self, number: int) -> Path:
        """Where the journal after a save is. Journal 0 begins with the run; there is no save 0."""
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
        """Removes saves and the journals after them."""
        for number in numbers:
            shutil.rmtree(self.save(number), ignore_errors=True)
            self.journal(number).unlink(missing_ok=True)

    def drop_before(self, number: int) -> None:
        """Removes everything older than a save."""
        self.drop(*(n for n in {*self.saves(), *self.journals()} if n < number))

    def clear_away(self) -> None:
        """Removes what was left by saving when it was killed."""
        for left in self.folder.glob(".*"):
            shutil.rmtree(left, ignore_errors=True)

    def _numbers(self, suffix: str) -> list[int]:
        names = (path.name for path in self.folder.iterdir())
        stems = (name.removesuffix(suffix) for name in names if name.endswith(suffix))
        return [int(stem) for stem in stems if stem.isdecimal() and len(stem) < 19]
