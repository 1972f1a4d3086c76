"""Renders a chat template in a process of its own, as transformers does.

A template is a program that came with a model, and the sandbox of Jinja stops neither loops nor
large texts. So this file is run by itself: it reads one JSON object from standard input, limits the
time and the memory of its process, and writes one JSON list to standard output. It imports nothing
of the rest.

Source: ``transformers/utils/chat_template_utils.py`` for what a template may use.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MOST = 1 << 18  # characters that a template may write


class Generation(Extension):
    """``{% generation %}``, with which templates mark what is to be learnt: it changes no text."""

    tags = {"generation"}  # noqa: RUF012  # as Jinja declares it

    def parse(self, parser: Parser) -> nodes.Node:
        """Its content, in a scope of its own."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class PlainNamespace(Namespace):
    """``namespace()`` without names that Python itself gives a meaning to."""

    def __init__(*args: Any, **named: Any) -> None:
        for name in dict(*args[1:], **named):
            _require_plain(name)
        Namespace.__init__(*args, **named)

    def __setitem__(self, name: str, value: Any) -> None:
        _require_plain(name)
        super().__setitem__(name, value)


def _require_plain(name: object) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"a namespace has no {str(name)[:80]!r}")


def environment(now: datetime) -> ImmutableSandboxedEnvironment:
    """What templates may use. ``now`` is the time that they are told."""

    def raise_exception(message: object) -> None:
        raise TemplateError(str(message))

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    def made(*args: Any, **named: Any) -> dict[Any, Any]:
        return dict(*args, **named)

    sandbox = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    sandbox.filters["tojson"] = tojson
    sandbox.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": now.strftime,
        "dict": made,
        "namespace": PlainNamespace,
    }
    return sandbox


def rendered(
    template: str, variables: Mapping[str, Any], cases: Sequence[Mapping[str, Any]], now: str
) -> list[dict[str, str]]:
    """A template's text for each of the cases, or why there is none.

    Args:
        template: In Jinja's language.
        variables: What it may use in every case.
        cases: What it may use in one: ``messages``, ``add_generation_prompt``.
        now: The date that it is told, in ISO format.
    Returns:
        For each case ``{"text": …}`` or ``{"error": …}``.
    """

    def written(write: Callable[[], str]) -> dict[str, str]:
        try:
            return {"text": write()}
        except MemoryError:
            return {"error": "it needs too much memory"}
        except RecursionError:
            return {"error": "it is nested too deeply"}
        except Exception as error:  # whatever a template does
            return {"error": " ".join(str(error).split())[:200] or type(error).__name__}

    def write(case: Mapping[str, Any]) -> str:
        pieces, length = [], 0
        program = environment(datetime.fromisoformat(now)).from_string(template)
        for piece in program.generate(**variables, **case):
            pieces.append(piece)
            length += len(piece)
            if length > MOST:
                raise TemplateError(f"it writes more than {MOST} characters")
        return "".join(pieces)

    return [written(lambda case=case: write(case)) for case in cases]  # type: ignore[misc]


def limit_this_process(seconds: int, memory: int) -> None:
    """Limits its time and its memory in bytes, and lets it write to no file, where the system can
    do that.
    """
    try:
        import resource
    except ImportError:  # Windows has none: the caller's time limit is left
        return
    for kind, most in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, seconds),
    ):
        try:
            resource.setrlimit(kind, (most, most))
        except (ValueError, OSError):  # a lower limit is in force already, or macOS refuses it
            continue


def main() -> None:
    """Renders what standard input asks for."""
    asked = json.loads(sys.stdin.buffer.read())
    limit_this_process(asked.pop("seconds"), asked.pop("memory"))
    sys.stdout.buffer.write(json.dumps(rendered(**asked)).encode())


if __name__ == "__main__":
    main()
