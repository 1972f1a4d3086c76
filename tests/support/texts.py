"""Texts of many scripts, and a SentencePiece model of some of them."""

import io
from typing import Any

import sentencepiece

CORPUS = """It is a truth universally acknowledged, that a single man in possession of a good
fortune, must be in want of a wife. However little known the feelings or views of such a man may be
on his first entering a neighbourhood, this truth is so well fixed in the minds of the surrounding
families, that he is considered the rightful property of some one or other of their daughters."""


TEXTS = [
    "",
    " ",
    "Hello, world!",
    " leading",
    "trailing ",
    "two  spaces\n\n\nand\ttabs",
    "numbers 1234567890 3.14",
    "it's we'll I'm THEY'RE",
    "naïve café — “quotes”",
    "漢字かな交じり文。한국어",
    "👩‍👩‍👧‍👦 🤖🏽 e\u0301\u0323",
    "\u202eעברית العربية",
    "def f(x):\n    return x ** 2\n",
]


def train_sentencepiece(**options: Any) -> bytes:
    """A small SentencePiece BPE model in Llama's style; ``options`` are those of its trainer."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.split("\n")),
        model_writer=out,
        **{
            "model_type": "bpe",
            "vocab_size": 350,
            "byte_fallback": True,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "allow_whitespace_only_pieces": True,
            "minloglevel": 2,
            **options,
        },
    )
    return out.getvalue()
