"""llama.cpp, by way of llama-cpp-python, on a GGUF file of the same weights.

A step evaluates one token and takes the argmax of its logits. Whatever the precision of the
weights, the cache is float16, llama.cpp's own choice; everything else is its default too.
"""

import importlib
from pathlib import Path
from typing import Any

import numpy as np

from brain.checkpoints.folder import stored_model
from brain.checkpoints.llama_names import EMBEDDING
from brain.measure.bench.contestants import PRECISIONS, row_bytes
from brain.measure.bench.gguf_writer import tensor_bytes
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
        config = stored_model(Path(job.folder)).config
        self.vocab_size = config.vocab_size
        sizes = tensor_bytes(config, PRECISIONS[job.precision].gguf)
        unread = 0 if config.tie_word_embeddings else sizes[EMBEDDING]
        self.weight_bytes = sum(sizes.values()) - unread
        self.row_bytes = row_bytes(config, "float16")
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
