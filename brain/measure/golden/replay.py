"""Running a script with a brain, through nothing but its public interface."""

import torch
from torch import Tensor

from brain.actions import Cull as CullAction
from brain.brain import Brain
from brain.measure.golden.script import Cull, Feed, Label, Observed, Prime, Read, Script, labels


def replay(brain: Brain, script: Script) -> Observed:
    """What the brain makes of the script, beginning with nothing remembered.

    Its memory must not forget by itself (``cull=none``).
    """
    if len(brain):
        brain.patch([CullAction(brain.mirror.position.tolist())])
    rows: list[Label] = []
    tokens: list[Label] = []
    logits: list[Tensor] = []
    surprises: list[Tensor] = []
    for number, step in enumerate(script):
        if isinstance(step, Prime):
            brain.prime(step.ids)
            mirror = brain.mirror
            tokens += labels(number, mirror.token_id.tolist(), mirror.position.tolist())
            surprises.append(torch.from_numpy(mirror.surprise))
        elif isinstance(step, Feed):
            first = int(brain.cursor.position[0]) + 1
            surprises.append(brain.feed(step.ids))
            tokens += labels(number, step.ids, range(first, first + len(step.ids)))
        elif isinstance(step, Cull):
            brain.patch([CullAction(step.positions)])
        elif isinstance(step, Read):
            if step.ids:
                reading = brain.read(tokens=step.ids, positions=step.positions)
                rows += labels(number, step.ids, step.positions)
            else:
                reading = brain.read()
                rows.append(
                    Label(number, int(brain.cursor.token[0]), int(brain.cursor.position[0]))
                )
            logits.append(reading.logits.cpu())
    vocab_size = brain.checkpoint.config.vocab_size
    return Observed(
        rows,
        torch.cat([torch.empty(0, vocab_size), *logits]),
        tokens,
        torch.cat([torch.empty(0), *surprises]),
    )
