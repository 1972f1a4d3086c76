"""llama.cpp, by way of llama-cpp-python, on a GGUF file.

A step evaluates one token and takes the argmax of its logits. Whatever the precision of the
weights, the cache is float16, llama.cpp's own choice; everything else is its default too.
"""

import importlib
from typing import Any

import numpy as np

from brain.measure.bench.job import Job

Logits = np.ndarray[tuple[int], np.dtype[np.float32]]


class LlamaCpp:
    """A context of as many rows as the others have."""

    def __init__(self, job: Job, *, cache_type: int | None = None) -> None:
        assert job.gguf is not None
        self._library: Any = importlib.import_module("llama_cpp")
        self._llama = self._library.Llama(
            job.gguf,
            n_gpu_layers=0 if job.device == "cpu" else -1,
            n_ctx=job.capacity,
            n_threads=job.threads,
            n_threads_batch=job.threads,
            type_k=cache_type,
            type_v=cache_type,
            verbose=False,
        )
        self.vocab_size = int(self._llama.n_vocab())
        self.weight_bytes, self.row_bytes = job.weight_bytes, job.row_bytes
        self._token = 0

    def capture(self) -> None:
        """Nothing is compiled."""

    def prime(self, ids: list[int]) -> None:
        """Only the last token's logits are computed."""
        self._llama.reset()
        self._llama.eval(ids)
        self._token = int(self.logits().argmax())

    def step(self) -> int:
        """One token."""
        self._llama.eval([self._token])
        self._token = int(self.logits().argmax())
        return self._token

    def logits(self) -> Logits:
        """Of the last token that was evaluated, [vocab]: llama.cpp's own memory until the next."""
        pointer = self._library.llama_get_logits_ith(self._llama.ctx, -1)
        return np.ctypeslib.as_array(pointer, shape=(self.vocab_size,))
