"""Standard streams that are closed, full or left by their readers."""

import io

import pytest

from brain.errors import OutputLost
from brain.machine.streams import Notes, Text


class Broken(io.StringIO):
    """A stream whose every write fails."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        raise self.error

    def flush(self) -> None:
        raise self.error


GONE, FULL = BrokenPipeError(32, "Broken pipe"), OSError(28, "No space left on device")


@pytest.mark.parametrize(
    "stream", [None, Broken(GONE), Broken(FULL), Broken(ValueError("closed"))], ids=range(4)
)
def test_notes_that_cannot_be_written_are_dropped(stream: io.StringIO | None) -> None:
    print("a note", file=Notes(stream), flush=True)


def test_notes_and_text_are_written() -> None:
    for kind in (Notes, Text):
        stream = io.StringIO()
        print("some text", file=kind(stream), flush=True)
        assert stream.getvalue() == "some text\n"
        assert not kind(stream).isatty()


@pytest.mark.parametrize(
    ("error", "raised"), [(GONE, BrokenPipeError), (FULL, OutputLost)], ids=["gone", "full"]
)
def test_text_that_is_lost_is_said_whenever_more_is_written(
    error: Exception, raised: type[Exception]
) -> None:
    text = Text(Broken(error))
    with pytest.raises(raised):
        text.write("some")
    text.flush()  # as Python does at its end
    with pytest.raises(raised):
        text.write("more")
    with pytest.raises(raised):
        text.require_written()
    Text(io.StringIO()).require_written()
