"""The command line: one Hydra application, ``brain GROUP=CHOICE KEY=VALUE …``.

Standard output carries the text alone; everything else goes to standard error and into the run
folder. Exit codes: 0 done, 2 refused, 130 interrupted.

PyTorch takes seconds to import. So nothing that is imported here imports it, and what can be
refused without it is refused at once.
"""

import codecs
import contextlib
import gc
import importlib
import importlib.resources
import inspect
import io
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from brain.config.compose import configuration_error, typed
from brain.config.overrides import literal_arguments
from brain.errors import BrainWarning, OutputLost, Refused, as_line, one_line
from brain.machine.memory import without_collection
from brain.machine.signals import endings_are_ctrl_c
from brain.machine.streams import take_streams
from brain.prompt_file import with_prompt
from brain.record.run_folder import clear_away, keep_composed, run_folder
from conf.schema import InspectTask, register

DONE, REFUSED, INTERRUPTED = 0, 2, 130


def main() -> None:
    """The console script."""
    # Without this Hydra prints errors and exits by itself; we print them in one line.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    # What the device can be needs no other backend, and looking for some reads every package.
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    logging.raiseExceptions = False  # it would print tracebacks where Hydra's notes are lost
    warnings.showwarning = _show_warning
    warnings.simplefilter("always", BrainWarning)  # whatever PYTHONWARNINGS says
    register()
    _write_utf8()
    try:
        with _in_one_line(), endings_are_ctrl_c():
            text = take_streams()
            try:
                if "--version" in sys.argv[1:]:
                    print(_version())
                elif {"--help", "-h"} & set(sys.argv[1:]):
                    print(_help())
                else:
                    sys.argv[1:] = literal_arguments(sys.argv[1:])
                    _application()
            finally:
                clear_away()
                text.flush()  # here, where somebody hears that it cannot be done
            text.require_written()
    except Exception as error:
        if _has_begun(error):
            raise
        # Hydra raises any kind of exception for arguments that it cannot parse.
        _leave(f"refused: {configuration_error(error)}", REFUSED)


def _has_begun(error: Exception) -> bool:
    """Whether the error comes from a task, and not from Hydra before it."""
    task = inspect.unwrap(_application).__code__
    return any(frame.f_code is task for frame, _ in traceback.walk_tb(error.__traceback__))


@hydra.main(version_base=None, config_path="pkg://conf", config_name="config")
def _application(composed: DictConfig) -> None:
    # Here as well as in main: Hydra would print what passes through it.
    with _in_one_line():
        try:
            conf = with_prompt(typed(composed))
            about = conf.task.path if isinstance(conf.task, InspectTask) else None
            with run_folder(about) as run_dir:
                _task(conf.task.name).run(conf, run_dir)
                if any(run_dir.iterdir()):
                    keep_composed()
        except (RuntimeError, MemoryError) as error:
            lacking = _lacking(error)
            if lacking is None:
                raise
            _leave(f"refused: {lacking}", REFUSED)


def _task(name: str) -> ModuleType:
    """The module of a task, with all that it imports. The collector of garbage, which would look
    through a million objects that stay, is kept from it.
    """
    full = f"brain.tasks.{name}"
    if full not in sys.modules:  # once in a multirun: what its first run left may be garbage
        with without_collection():
            importlib.import_module(full)
            gc.freeze()
    return sys.modules[full]


def _lacking(error: Exception) -> str | None:
    """What the machine has too little of, and what helps, if that is what the error says."""
    whole = one_line(error)
    of_host = whole.partition("DefaultCPUAllocator: ")[2]
    reason = (of_host or whole).split(". ")[0]
    # It raises none where it has not been imported.
    of_device = getattr(sys.modules.get("torch"), "OutOfMemoryError", MemoryError)
    if of_host or isinstance(error, (MemoryError, of_device)):
        return f"{reason}; use a smaller capacity, model or dtype"
    if "can't start new thread" in reason:
        return f"{reason}; set threads=1, or allow more processes (ulimit -u)"
    return None


@contextmanager
def _in_one_line() -> Iterator[None]:
    """Ends the program with one line for an error that is not the program's own."""
    try:
        yield
    except Refused as refusal:
        _leave(f"refused: {refusal}", REFUSED)
    except BrokenPipeError:
        pass  # whoever read our output has left
    except (HydraException, OmegaConfBaseException) as error:  # some of them are OSErrors
        _leave(f"refused: {configuration_error(error)}", REFUSED)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _leave(f"refused: {where}{error.strerror or one_line(error)}", REFUSED)
    except KeyboardInterrupt:
        _leave("interrupted", INTERRUPTED)


def _write_utf8() -> None:
    """Makes both output streams UTF-8, whatever the locale is."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and codecs.lookup(stream.encoding).name != "utf-8":
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")


def _help() -> str:
    """The help that Hydra would print, too, but only after it had listed every group."""
    text = importlib.resources.files("conf").joinpath("hydra/help/brain.yaml").read_text("utf-8")
    return str(OmegaConf.create(text).template)


def _version() -> str:
    import torch

    from brain.config.settings import device_of
    from brain.machine.environment import environment

    here = environment(device := device_of("auto"))
    name = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    ours = here["positronic-brain"] or "(not installed)"
    return f"positronic-brain {ours}, PyTorch {here['torch']}, {here['device']}{name}"


def _leave(message: str, status: int) -> None:
    print(as_line(message), file=sys.stderr, flush=True)
    with contextlib.suppress(BrokenPipeError, OutputLost):  # there is a reason to leave already
        sys.stdout.flush()
    sys.exit(status)


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    # Warnings of libraries are for developers; ours are for the person at the terminal.
    if issubclass(category, BrainWarning):
        print(f"warning: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
