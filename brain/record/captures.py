"""Captures: what every step of a tick received and returned, on disk.

For tick N of a run, ``tick_N.safetensors`` holds the tensors, and ``tick_N.json`` their meaning in
numbers and words. The names of the tensors say where they belong:

* ``read.in.*``: token, position, and the mirror it was read against (position, token_id, valid)
* ``read.out.*``: logits (the highest ``top``, with their ids, or all), new keys and values,
  attention mass of every slot and of the token itself
* ``choose.in.*``: sampling settings; ``choose.out.*``: candidates after all filters with their
  probabilities, token, surprise
* ``patch.in.*``: the plan: the row's columns, what to cull, every row's brightness

They are written by an observer of the loop (``tick.py``). With captures off there is none, and no
cost.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from brain.brain import Brain
from brain.files import require_own
from brain.mirror import SOURCES
from brain.record.heatmap import remembered
from brain.tick import Step
from compiled.sample import candidates, penalize_some
from compiled.state import COLUMNS

TOP_IN_JSON = 20  # the fewest rows of the tables in the JSON


class CaptureWriter:
    """An observer that writes each tick of a brain into a folder. Raises Refused for a link.

    ``top``: how many of the highest logits are written, 0 for all. The tables of the JSON have as
    many rows, and TOP_IN_JSON at least.
    """

    def __init__(self, folder: Path, brain: Brain, top: int) -> None:
        self._folder = folder
        self._brain = brain
        self._top = top
        require_own([folder])
        folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, step: Step) -> None:
        """Writes one tick."""
        tensors, described = self._tensors(step), self._description(step)
        path = self._folder / f"tick_{step.tick.number:06d}"
        save_file(tensors, path.with_suffix(".safetensors"))
        text = json.dumps(described, indent=2, ensure_ascii=False)
        path.with_suffix(".json").write_text(text + "\n", "utf-8")

    def _tensors(self, step: Step) -> dict[str, Tensor]:
        brain, state = self._brain, self._brain.state
        scores, ids = self._candidates(step)
        kept = scores.isfinite()
        tensors = {
            "read.in.token": step.cursor.token,
            "read.in.position": step.cursor.position,
            "read.out.new_keys": step.reading.new_keys,
            "read.out.new_values": step.reading.new_values,
            "read.out.mass": step.reading.mass,
            "read.out.own_mass": step.reading.own_mass,
            "choose.out.candidates": ids[kept],
            "choose.out.probabilities": torch.softmax(scores[kept], 0),
            "choose.out.token": step.choice.token,
            "choose.out.surprise": step.choice.surprise,
            "patch.in.cull": step.plan.cull,
            "patch.in.culled_positions": step.choice.culled,
            "patch.in.row.length": step.plan.length,
        }
        tensors |= {f"read.in.mirror.{name}": getattr(state, name) for name in COLUMNS}
        tensors |= {f"choose.in.{k}": v for k, v in brain.graphs.sampling._asdict().items()}
        tensors |= {f"patch.in.{k}": v for k, v in step.plan.updates.items()}
        tensors |= {f"patch.in.row.{k}": v for k, v in step.plan.rows.items()}
        tensors |= {f"patch.in.cursor.{k}": v for k, v in step.plan.cursor._asdict().items()}
        logits = step.reading.logits[0]
        if self._top:
            top = torch.topk(logits, min(self._top, len(logits)))
            tensors |= {"read.out.logits": top.values, "read.out.logits_ids": top.indices}
            tensors["read.out.logsumexp"] = torch.logsumexp(logits, 0, keepdim=True)
        else:
            tensors["read.out.logits"] = logits
        # Copies, because safetensors refuses tensors that share memory.
        return {name: t.detach().clone().cpu().contiguous() for name, t in tensors.items()}

    def _candidates(self, step: Step) -> tuple[Tensor, Tensor]:
        """Scores and ids of the tokens that could be drawn, filtered as ``choose`` does it."""
        sampling, state = self._brain.graphs.sampling, self._brain.state
        pending = step.cursor.token
        seen = torch.cat([torch.where(state.valid, state.token_id, pending), pending])
        penalised = penalize_some(step.reading.logits[0], seen, sampling.repetition_penalty)
        method = self._brain.settings.graphs.method
        if method.greedy:
            best = penalised.argmax(-1, keepdim=True)
            return torch.zeros(1, device=best.device), best
        return candidates(penalised, method, sampling)

    def _description(self, step: Step) -> dict[str, Any]:
        tick, mirror = step.tick, self._brain.mirror
        logits = step.reading.logits[0]
        kept = max(TOP_IN_JSON, self._top)
        shares, ids = torch.topk(torch.softmax(logits, 0), min(kept, len(logits)))
        mass = step.reading.mass.cpu()
        columns = (mirror.slot.tolist(), mirror.position.tolist(), mirror.token_id.tolist())
        attended = sorted(zip(*columns, strict=True), key=lambda row: -float(mass[row[0]]))
        read_token = int(step.cursor.token[0])
        return {
            "tick": tick.number,
            "remembered": [dataclasses.asdict(row) for row in remembered(self._brain)],
            "1 read": {
                "received": {
                    "token": read_token,
                    "text": self._text(read_token),
                    "position": int(step.cursor.position[0]),
                    "already_remembered": int(step.cursor.uncommitted) == 0,
                    "rows": len(mirror),
                },
                "returned": {
                    "likeliest": [
                        {"token": token, "text": self._text(token), "probability": share}
                        for token, share in zip(ids.tolist(), shares.tolist(), strict=True)
                    ],
                    "most_attended": [
                        {"position": at, "token": token, "text": self._text(token)}
                        | {"mass": float(mass[slot])}
                        for slot, at, token in attended[:kept]
                    ],
                    "mass_on_cache": float(mass.sum()),
                    "mass_on_itself": float(step.reading.own_mass.sum()),
                },
            },
            "2 score, 3 decide": {
                "token": tick.token,
                "text": self._text(tick.token),
                "surprise": tick.surprise,
                "position": tick.position,
                "culled": list(tick.culled),
            },
            "4 patch": {
                "appended": [
                    {
                        "position": int(step.plan.rows["position"][0]),
                        "token": int(step.plan.rows["token_id"][0]),
                        "source": SOURCES[int(step.plan.rows["source"][0])],
                        "surprise": float(step.plan.rows["surprise"][0]),
                    }
                ][: int(step.plan.length)],
                "culled": list(tick.culled),
                "rows_afterwards": tick.count,
            },
        }

    def _text(self, token: int) -> str:
        return self._brain.tokenizer.decode([token], at_start=False)
