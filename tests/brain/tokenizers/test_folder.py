"""Tokenizers of folders that contradict themselves: the ids of transformers, or a line about it.

``python tests/brain/tokenizers/test_folder.py --folders 1000`` draws more of them.
"""

import argparse
import importlib.util
import json
import tempfile
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest

from brain.errors import BrainWarning, Refused
from brain.tokens import load_tokenizer
from tokenizer_folders import SAID, Drawn, Json, Specimens, write_folder

DRAWN = 40
PROTOBUF = (
    importlib.util.find_spec("google.protobuf") if importlib.util.find_spec("google") else None
)
PLACES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "generation_config.json", "config.json", "transformers", "settings"),
)
KEPT = "keeps it; transformers"  # a space that begins a text
OTHER_IDS = (
    "counts as written; transformers",  # the same, and after special tokens, of tokenizer.model
    "by the order of transformers",  # ids that a folder states and transformers renumbers
    "would merge its pieces",  # a tokenizer.model that LlamaTokenizer reads as what it is not
    "split_special_tokens in tokenizer_config.json is not followed",
)
"""The lines that tell of ids that are not those of transformers."""
OTHER_BEGINNING = ("transformers puts none", "only BOS is put there", OTHER_IDS[1])


@pytest.fixture(scope="module")
def specimens() -> Specimens:
    return Specimens()


def reference(folder: Path) -> Any:
    """The tokenizer of transformers."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def faults(folder: Path, seen: Counter[str]) -> list[str]:
    """Where this folder's tokenizer differs from that of transformers, and no line tells of it."""
    try:
        theirs = reference(folder)
        expected = [theirs(text, add_special_tokens=False).input_ids for text in SAID]
        begun = [theirs(text).input_ids for text in SAID]
    except Exception:
        seen["transformers fails"] += 1
        return []  # there is nothing to compare with
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", BrainWarning)
        try:
            ours = load_tokenizer(folder)
            found = [ours.encode(text) for text in SAID]
        except Refused as refusal:
            seen["refused"] += 1
            named = [place for place in PLACES if place in str(refusal)]
            return [] if len(named) > 1 else [f"refused: {refusal}"]
    lines = [str(w.message) for w in caught]
    told = [line for line in lines if sum(place in line for place in PLACES) > 1]
    seen["told" if told else "not a word"] += 1

    def excused(excuses: Sequence[str]) -> bool:
        given = [excuse for excuse in excuses for line in told if excuse in line]
        seen.update(given)
        return bool(given)

    wrong = []
    prefix = ours.initial_prompt("x")[: -len(ours.encode("x"))]
    for text, ids, right, full in zip(SAID, found, expected, begun, strict=True):
        if ids != right and not excused([*OTHER_IDS, *([KEPT] if text[0] == " " else [])]):
            wrong.append(f"{text!r}: {ids}, not {right}")
        count = next((n for n in range(len(full)) if full[n : n + len(right)] == right), 0)
        if prefix != full[:count] and not excused(OTHER_BEGINNING):
            wrong.append(f"{text!r} begins with {prefix}, not {full[:count]}")
    stops: Json = json.loads((folder / "config.json").read_text())
    if (folder / "generation_config.json").exists():
        stops |= json.loads((folder / "generation_config.json").read_text())
    stop = stops.get("eos_token_id", theirs.eos_token_id)
    ends = {*(stop if isinstance(stop, list) else [stop])}
    if ours.eos_ids != ends and not excused(["each of them ends a text"]):
        wrong.append(f"EOS {sorted(ours.eos_ids)}, not {stop}")
    return [f"{fault}; said: {lines}" for fault in wrong]


def draw(
    seed: int, specimens: Specimens, folder: Path, seen: Counter[str] | None = None
) -> list[str]:
    drawn = Drawn(Random(seed), specimens, alone=PROTOBUF is not None)
    path = write_folder(folder / str(seed), drawn.files())
    return faults(path, Counter() if seen is None else seen)


@pytest.mark.parametrize("seed", range(DRAWN))
def test_contradictions_are_settled_as_by_transformers_or_told(
    seed: int, specimens: Specimens, tmp_path: Path
) -> None:
    assert draw(seed, specimens, tmp_path) == []


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--folders", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    given, trained, bad = parser.parse_args(), Specimens(), 0
    tally: Counter[str] = Counter()
    for number in range(given.first, given.first + given.folders):
        with tempfile.TemporaryDirectory() as place:
            for fault in draw(number, trained, Path(place), tally):
                bad += 1
                print(f"{number}: {fault}", flush=True)
    print(f"{given.folders} folders, {bad} faults; {dict(tally)}")
    raise SystemExit(bool(bad))
