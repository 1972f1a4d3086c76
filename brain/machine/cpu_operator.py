"""The CPU's operators, built for this machine once and kept in the cache folder."""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from brain.errors import Refused, one_line
from brain.files import cache_folder
from brain.machine.built_folder import ensure_built
from brain.machine.compiler import FULL_DISK, complaint
from brain.machine.streams import Notes
from compiled import draw_cpu, read_cpu, tick_cpu
from compiled.cpu_library import Libraries, load
from compiled.read_cpu import Formats

# On ARM either compiler knows this processor by this name; older Clangs know no other.
NATIVE = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
FLAGS = (
    *("-std=c++17", "-O3", NATIVE, "-fno-math-errno", "-fno-trapping-math"),
    *("-fopenmp-simd", "-pthread", "-shared", "-fPIC"),  # the pragmas, without OpenMP's library
)


def native_libraries(formats: Formats, cache_dir: Path | None = None) -> Libraries:
    """The libraries of ``compiled/`` for these number formats, as :func:`built_library` builds
    them, all at once. Raises Refused where one cannot be built or loaded.
    """
    compiler = cpp_compiler()
    defined = (f"-DREAL={formats.real}", f"-DWEIGHT={formats.weight}")
    try:
        with ThreadPoolExecutor() as pool:
            read = pool.submit(built_library, read_cpu.SOURCE, compiler, defined, cache_dir)
            draw = pool.submit(built_library, draw_cpu.SOURCE, compiler, (), cache_dir)
            tick = pool.submit(built_library, tick_cpu.SOURCE, compiler, (), cache_dir)
        libraries = Libraries(read.result(), draw.result(), tick.result())
        load(libraries.read, read_cpu.Arguments)  # a folder may forbid execution
        load(libraries.draw, draw_cpu.Arguments)
        load(libraries.tick, tick_cpu.Arguments)
    except Refused as refusal:
        raise Refused(f"{refusal}; or use engine=eager") from None
    except OSError as error:
        raise Refused(f"{one_line(error)}; or use engine=eager") from None
    return libraries


def built_library(
    source: Path, compiler: str, defined: tuple[str, ...] = (), cache_dir: Path | None = None
) -> Path:
    """The shared library of a C++ file, compiled first where it is absent or damaged. It is named
    for all that it depends on. ``cache_dir`` defaults to the user's cache folder. Raises Refused.
    """
    flags = (*FLAGS, *defined)
    name = f"{source.stem}-{_identity(source, compiler, flags)}"

    def build(folder: Path) -> None:
        library = folder / f"{name}.so"
        print(f"building {source.name}, once: some seconds …", file=Notes(sys.stderr), flush=True)
        command = [compiler, *flags, str(source), "-o", str(library)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if done.returncode or not library.exists():
            reason = complaint(done.stderr)
            if any(sign in reason for sign in FULL_DISK):
                raise OSError(reason)
            raise Refused(
                f"{compiler} cannot build {source.name} ({reason}): "
                "set CXX to another C++17 compiler"
            )

    return ensure_built(cache_folder(cache_dir) / name, build) / f"{name}.so"


def cpp_compiler() -> str:
    """The C++ compiler that ``CXX`` names, or one that is installed. Raises Refused."""
    asked = os.environ.get("CXX")
    for name in [asked] if asked else ["g++", "clang++", "c++"]:
        found = shutil.which(name)
        if found:
            return found
    if asked:
        raise Refused(
            f"CXX={asked} cannot be run: name a C++ compiler without arguments, or use engine=eager"
        )
    raise Refused("no C++ compiler is installed (g++ or clang++): install one, or use engine=eager")


def _identity(source: Path, compiler: str, flags: tuple[str, ...]) -> str:
    """Sixteen hexadecimal digits for everything that the library depends on."""
    resolved = Path(compiler).resolve()
    status = resolved.stat()
    built_by = (flags, str(resolved), status.st_size, status.st_mtime_ns, platform.machine())
    texts = [path.read_text("utf-8") for path in (source, *sorted(source.parent.glob("*.h")))]
    described = repr((texts, built_by, _processor()))
    return hashlib.sha256(described.encode()).hexdigest()[:16]


def _processor() -> str:
    """What ``NATIVE`` sees: homes are shared by machines of different kinds."""
    if sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text("utf-8", errors="replace").split("\n\n")[0]
        wanted = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU part")
        return "\n".join(line for line in lines.splitlines() if line.startswith(wanted))
    return platform.processor()
