"""Facts to be planted in a text and asked for later.

Each kind is a statement, a question whose next word is the answer, and the pool of words that the
answer and its distractors come from. They differ in how much they stand out: a record stands alone
on its line, a remark hides in the prose around it.
"""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

from brain.errors import Refused
from brain.tokens import Tokenizer

DISTRACTORS = 9
"""Wrong answers beside the right one. Chance is one in ten."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words(
    "Osborne Tremaine Hollis Quentin Barnaby Ingrid Rosalind Thaddeus Wilhelm Cordelia Ambrose "
    "Felicity Gideon Jasper Leopold Miriam Nathaniel Octavia Percival Sabrina Tobias Ursula "
    "Vincent Winifred Yolanda Zachary Beatrice Clement Dorothea Montague Philippa Reginald"
)
MATERIALS = _words(
    "copper glass silver wood iron stone paper gold ivory brass wax leather silk clay bone steel "
    "marble chalk coal salt"
)
SURNAMES = _words(
    "Parker Hughes Fisher Webb Stone Marsh Cooper Walsh Grant Chapman Knight Mason Wolf Fox Reed "
    "Palmer Hunter Baker Cook Young"
)
THINGS = _words("letter crown map diary medal violin lantern mirror ring sword flute compass")
ROOMS = _words("kitchen attic cellar garden library stable nursery chapel tower barn hall")
ANIMALS = _words("horse cat dog wolf bear goose snake fox bull rat owl lion bird sheep goat")
QUALITIES = _words("patient crooked silent hungry golden sleepless laughing purple drowned clever")
TRADES = _words("gardener blacksmith sailor tailor nurse priest carpenter miller doctor shepherd")
COLOURS = _words("green yellow scarlet brown orange violet silver black white blue red grey")
PLACES = _words("bridge station harbour market mill castle bank church inn farm prison school")
NUMBERS = _words("four nine twelve thirty forty seven eleven sixty ninety eighty three fifty")


@dataclass(frozen=True)
class Kind:
    """``statement`` and ``question`` are templates; ``answers`` fills ``{answer}``."""

    name: str
    statement: str
    question: str
    answers: Sequence[str]


KINDS = (
    Kind(
        "key",
        "\nThe secret key of {name} is made of {answer}. Remember it.\n",
        "\nThe secret key of {name} is made of",
        MATERIALS,
    ),
    Kind("record", "\nItem held by {name}: {answer}\n", "\nItem held by {name}:", MATERIALS),
    Kind(
        "name",
        "\nIt was {name} {answer} who had hidden the {thing} beneath the old chapel. Nobody else "
        "knew.\n",
        "\nThe {thing} beneath the old chapel had been hidden by {name}",
        SURNAMES,
    ),
    Kind(
        "quote",
        '\n"Beware of the {quality} {answer}," said {name} to the {trade}.\n',
        '\nThe {trade} remembered what {name} had said: "Beware of the {quality}',
        ANIMALS,
    ),
    Kind(
        "remark",
        " In those years the {thing} of {name} was kept in the {answer}, and nobody thought it "
        "strange.",
        " As everyone knew, the {thing} of {name} was kept in the",
        ROOMS,
    ),
    Kind(
        "gossip",
        " The carriage of Sir {name} had been painted {answer} that spring, to the great amusement "
        "of his friends.",
        " He remembered that the carriage of Sir {name} had been painted",
        COLOURS,
    ),
    Kind(
        "note",
        "\nDear {name}, the parcel you asked for is waiting for you at the {answer}. Yours, the "
        "clerk.\n",
        "\nThe clerk had told {name} that the parcel was waiting at the",
        PLACES,
    ),
    Kind(
        "count",
        " {name} counted the {thing}s twice and found that there were {answer} of them.",
        " When {name} had counted the {thing}s, there were",
        NUMBERS,
    ),
)


@dataclass(frozen=True)
class Fact:
    """One fact as tokens. The answer is ``options[0]``; all are distinct."""

    kind: str
    statement: tuple[int, ...]
    question: tuple[int, ...]
    options: tuple[int, ...]  # the token that tells the answer, then the distractors


def make_facts(tokenizer: Tokenizer, count: int, kinds: Sequence[Kind], seed: str) -> list[Fact]:
    """Facts of every kind in turn, about different people, the same for the same seed."""
    if count > len(NAMES):
        raise Refused(f"{count} facts in one text: there are {len(NAMES)} names for them")
    draw = random.Random(seed)
    names = draw.sample(NAMES, len(NAMES))
    return [
        _fact(tokenizer, kinds[index % len(kinds)], names[index % len(names)], draw)
        for index in range(count)
    ]


def _fact(tokenizer: Tokenizer, kind: Kind, name: str, draw: random.Random) -> Fact:
    words = {
        "name": name,
        "thing": draw.choice(THINGS),
        "quality": draw.choice(QUALITIES),
        "trade": draw.choice(TRADES),
    }
    prefix, tokens = _told_apart(tokenizer, kind.answers)
    firsts: dict[int, str] = {}
    for word in draw.sample(sorted(tokens), len(tokens)):
        firsts.setdefault(tokens[word], word)
    options = tuple(firsts)[: DISTRACTORS + 1]
    if len(options) < 2:
        raise Refused(f"this tokenizer cannot tell the answers of {kind.name!r} facts apart")
    answer = firsts[options[0]]
    return Fact(
        kind=kind.name,
        statement=tuple(tokenizer.encode(kind.statement.format(**words, answer=answer))),
        question=(*tokenizer.encode(kind.question.format(**words)), *prefix),
        options=options,
    )


def _told_apart(tokenizer: Tokenizer, words: Sequence[str]) -> tuple[list[int], dict[str, int]]:
    """The tokens with which all these words begin in the middle of a text (none, or a space that is
    a token of its own), and the token that comes next for each of them.
    """
    before = len(tokenizer.encode("a"))
    spelled = {word: tokenizer.encode(f"a {word}")[before:] for word in words}
    together = zip(*spelled.values(), strict=False)
    prefix = [ids[0] for ids in itertools.takewhile(lambda ids: len(set(ids)) == 1, together)]
    return prefix, {word: ids[len(prefix)] for word, ids in spelled.items() if ids[len(prefix) :]}
