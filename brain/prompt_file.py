"""``prompt_file``: the prompt from a file or from standard input."""

import sys
from dataclasses import replace

from brain.errors import Refused, one_line
from brain.files import given_path, read_bytes
from conf.schema import Conf

STANDARD_INPUT = "-"
MOST_BYTES = 1 << 26  # some ten times the longest novel


def with_prompt(conf: Conf) -> Conf:
    """The configuration with the text that ``prompt_file`` names as its prompt, character for
    character. Raises Refused if that is not to be had, empty, or not UTF-8.
    """
    if conf.prompt_file is None:
        return conf
    return replace(conf, prompt=text_of(conf.prompt_file, "prompt_file"))


def text_of(file: str, key: str) -> str:
    """The text in a file; ``-`` is standard input. Raises Refused, naming ``key``, which asked for
    it, if that is not to be had, empty, or not UTF-8.
    """
    name = "standard input" if file == STANDARD_INPUT else file
    try:
        content = _content(file)
    except OSError as error:
        raise Refused(f"{key}: {name} cannot be read ({one_line(error)})") from None
    if not content:
        raise Refused(f"{key}: {name} is empty: give some text")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise Refused(
            f"{key}: {name} is not UTF-8: byte 0x{content[error.start]:02x} at offset "
            f"{error.start}; convert it first, as with iconv"
        ) from None


def _content(file: str) -> bytes:
    if file != STANDARD_INPUT:
        return read_bytes(given_path(file), MOST_BYTES)
    content = sys.stdin.buffer.read(MOST_BYTES + 1) if sys.stdin else b""  # it may be closed
    if len(content) > MOST_BYTES:
        raise OSError(f"it has more than {MOST_BYTES >> 20} MiB")
    return content
