"""Golden logits: what the reference implementation computes, kept in small files, and the check
of our own engine against them.

* ``script.py``: what is done, step by step, as plain data
* ``replay.py``: doing it with a brain, through its public interface
* ``reference.py``: doing it with Hugging Face transformers, in masked passes (optional dependency)
* ``judge.py``: comparing the two
* ``files.py``: the golden file; ``cases.py``: which ones there are; ``seeded.py``: models made of
  a seed
"""
