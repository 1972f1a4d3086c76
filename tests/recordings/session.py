"""One scenario that is being played: how its processes are run and what is kept of them."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
THREADS = 2
PATIENCE = 900
"""Seconds that one process may take."""

Settings = Mapping[str, object]
"""Keys and values of the command line."""


@dataclass
class Session:
    """One scenario that is being played by one revision, recorded in one stage.

    Children run in the recording's folder and are given relative paths, so that no path tells one
    recording from another.
    """

    out: Path
    checkout: Path
    cache: Path
    stage: str
    name: str
    processes: int = 0

    @property
    def folder(self) -> str:
        """Where the scenario leaves what it makes, from the recording's folder."""
        return f"{self.stage}/{self.name}/run"

    def brain(self, settings: Settings, within: str = "", *, heard: bool = True) -> None:
        """Runs the console script with the scenario's folder, or one in it, as its run folder.
        Unless it is ``heard``, what it prints is not kept.
        """
        stdout, status = self._run(self._command(settings, within))
        self.keep(stdout if heard else None, status)

    def command(self, *arguments: str) -> None:
        """Runs the console script with these arguments and no others."""
        self.keep(*self._run([self._bin("brain"), *arguments]))

    def tell(self, actions: str) -> None:
        """Sends commands to the run in the scenario's folder, with ``task=command``."""
        told = {"task": "command", "task.path": self.folder, "task.actions": actions}
        self.keep(*self._run(self._command(told, "../told")))
        shutil.rmtree(self.out / self.folder / "../told", ignore_errors=True)  # of older revisions

    def append(self, line: str) -> None:
        """Writes a line into the inbox of that run, as another program would."""
        with (self.out / self.folder / "commands.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def refused(self, arguments: Sequence[str]) -> None:
        """Runs the console script on bad input and records the exit code alone."""
        scratch = f"{self.stage}/{self.name}/scratch"
        command = [self._bin("brain"), *arguments, f"hydra.run.dir={scratch}"]
        _, status = self._run(command)
        self.keep(None, status)
        shutil.rmtree(self.out / scratch, ignore_errors=True)

    def api(self, what: str, *arguments: str) -> None:
        """Runs a function of ``api_runs.py`` in the revision's environment."""
        (self.out / self.folder).mkdir(parents=True, exist_ok=True)
        program = [self._bin("python"), str(HERE / "api_runs.py")]
        stdout, status = self._run([*program, what, self.folder, *arguments])
        self.keep(stdout, status)
        if status:
            print(f"{self.name}: {what} failed, see {self.out / 'logs'}", file=sys.stderr)

    def killed(self, settings: Settings, within: str, tokens: int) -> None:
        """Runs the console script and kills it once it has written so many tokens."""
        told = self.out / self.folder / within / "tokens.txt"
        with self._log().open("wb") as log:
            process = subprocess.Popen(
                self._command(settings, within),
                cwd=self.out,
                env=self._environment(),
                stdout=subprocess.DEVNULL,
                stderr=log,
            )
            deadline = time.monotonic() + PATIENCE
            while process.poll() is None and time.monotonic() < deadline:
                if told.exists() and told.read_bytes().count(b"\n") >= tokens:
                    break
                time.sleep(0.005)
            process.send_signal(signal.SIGKILL)
            self.keep(None, process.wait())

    def keep(self, stdout: bytes | None, status: int) -> None:
        """Writes down what a process printed, if that is told, and its exit code."""
        self.processes += 1
        said = self.out / self.stage / self.name / "said"
        said.mkdir(parents=True, exist_ok=True)
        if stdout is not None:
            (said / f"{self.processes}.stdout").write_bytes(stdout)
        (said / f"{self.processes}.exit").write_text(f"{status}\n")

    def note(self, name: str, text: str) -> None:
        """Writes down something that was found out about what was recorded."""
        (self.out / self.stage / self.name / "said" / name).write_text(text + "\n", "utf-8")

    def _command(self, settings: Settings, within: str) -> list[str]:
        folder = os.path.normpath(f"{self.folder}/{within}")
        return [self._bin("brain"), *arguments(settings), f"hydra.run.dir={folder}"]

    def _run(self, command: Sequence[str]) -> tuple[bytes, int]:
        with self._log().open("wb") as log:
            done = subprocess.run(
                command,
                cwd=self.out,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                timeout=PATIENCE,
                check=False,
            )
        return done.stdout, done.returncode

    def _bin(self, program: str) -> str:
        return str(self.checkout / ".venv" / "bin" / program)

    def _log(self) -> Path:
        path = self.out / "logs" / f"{self.stage}.{self.name}.{self.processes + 1}.stderr"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _environment(self) -> dict[str, str]:
        """The caller's environment, less what could change a run, with a cache of its own."""
        mattering = ("PYTHON", "OMP_", "MKL_", "TORCH", "HYDRA_", "XDG_CACHE", "LC_", "VIRTUAL_ENV")
        kept = {key: value for key, value in os.environ.items() if not key.startswith(mattering)}
        return kept | {
            "XDG_CACHE_HOME": str(self.cache),
            "TORCHINDUCTOR_CACHE_DIR": str(self.cache / "inductor"),
            "OMP_NUM_THREADS": str(THREADS),
            "OMP_WAIT_POLICY": "PASSIVE",
            "PYTHONNOUSERSITE": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "LC_ALL": "C.UTF-8",
            "COLUMNS": "100",
            "NO_COLOR": "1",
        }


def arguments(settings: Settings) -> list[str]:
    """Settings as the command line takes them."""
    return [f"{key}={value}" for key, value in settings.items()]
