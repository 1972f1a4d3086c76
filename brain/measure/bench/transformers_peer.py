"""Hugging Face transformers: eager with a cache that grows, or compiled with a static one.

A step is a forward pass and an argmax.
"""

import importlib
from typing import Any

import torch

from brain.measure.bench.contestants import PRECISIONS, STATIC
from brain.measure.bench.job import Job

CHUNK = 1024
"""Most tokens of a prompt in one pass."""


class Transformers:
    """``DynamicCache`` and eager, or ``StaticCache`` and ``torch.compile``."""

    def __init__(self, job: Job) -> None:
        library: Any = importlib.import_module("transformers")
        library.utils.logging.disable_progress_bar()
        self._device = torch.device(job.device)
        dtype = getattr(torch, PRECISIONS[job.precision].dtype)
        model: Any = library.AutoModelForCausalLM.from_pretrained(job.folder, dtype=dtype)
        self._model = model.to(self._device).eval()
        self.vocab_size = int(model.config.vocab_size)
        self.weight_bytes, self.row_bytes = job.weight_bytes, job.row_bytes
        self._static = job.engine == STATIC
        self._cache: Any = (
            library.StaticCache(model.config, max_cache_len=job.capacity)
            if self._static
            else library.DynamicCache(config=model.config)
        )
        self._step = (
            torch.compile(model.__call__, mode="reduce-overhead", fullgraph=True, dynamic=False)
            if self._static
            else model
        )
        self._token = torch.zeros(1, 1, dtype=torch.int64, device=self._device)
        self._position = 0

    def capture(self) -> None:
        """Nothing: it is compiled by the first steps."""

    @torch.inference_mode()
    def prime(self, ids: list[int]) -> None:
        """Eager, as ``generate`` does it: only the last token's logits are computed."""
        if self._static:
            self._cache.reset()  # a compiled step knows its cache by address
        else:
            self._cache = type(self._cache)(config=self._model.config)
        logits = torch.empty(0)
        for start in range(0, len(ids), CHUNK):
            chunk = torch.tensor([ids[start : start + CHUNK]], device=self._device)
            where = torch.arange(start, start + chunk.shape[1], device=self._device)[None]
            logits = self._model(
                chunk,
                position_ids=where,
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits
        self._token = logits[:, -1:].argmax(-1)
        self._position = len(ids)
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    @torch.inference_mode()
    def step(self) -> int:
        """One forward pass."""
        where = torch.tensor([[self._position]], device=self._device)
        out = self._step(
            self._token, position_ids=where, past_key_values=self._cache, use_cache=True
        )
        self._token = out.logits[:, -1:].argmax(-1)
        self._position += 1
        return int(self._token)
