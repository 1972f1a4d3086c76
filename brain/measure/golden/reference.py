"""Running a script with Hugging Face transformers, without any cache: the other implementation.

A context is one list of *entries*: every token that was ever read in it, with its position and the
set of entries it saw. One pass over the entries with that set as attention mask and the original
positions gives the logits of all of them. A token that is read again in the same surroundings is
the same entry, so where nothing was forgotten the pass is the model's ordinary causal one and
no mask is given at all.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from brain.checkpoints.llama_names import packed_parts
from brain.errors import Refused
from brain.measure.golden.script import Cull, Feed, Label, Observed, Prime, Read, Script, labels
from brain.measure.golden.seeded import SeededModel

Model = Any  # transformers.LlamaForCausalLM, where it is installed


def transformers() -> Any:
    """The library. Raises Refused where it is not installed."""
    try:
        import transformers as library
    except ImportError:
        raise Refused(
            "goldens are written with Hugging Face transformers, which is not installed: "
            "pip install 'positronic-brain[reference]'"
        ) from None
    return library


def load_reference(folder: Path, dtype: torch.dtype) -> Model:
    """The reference implementation of a model folder."""
    library = transformers()
    library.utils.logging.disable_progress_bar()
    return library.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def seeded_reference(seeded: SeededModel, dtype: torch.dtype) -> Model:
    """The reference implementation of a seeded model."""
    library = transformers()
    c = seeded.config
    config = library.LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_kv_heads,
        head_dim=c.head_dim,
        rms_norm_eps=c.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        max_position_embeddings=c.max_position_embeddings,
        tie_word_embeddings=c.tie_word_embeddings,
        dtype=dtype,
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = library.AutoModelForCausalLM.from_config(config).eval()
    finally:
        torch.set_default_dtype(default)
    parameters = dict(model.named_parameters())
    names = [name for parts in packed_parts(c).values() for name, _ in parts]
    if set(names) != set(parameters):
        raise Refused(f"{seeded.name}: the reference has other parameters than {len(names)} known")
    with torch.no_grad():
        for name in names:
            seeded.fill(parameters[name], name)
    return model


class _Context:
    """Every token that was read since a prime, and what it saw."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.positions: list[int] = []
        self.seen: list[frozenset[int]] = []  # earlier entries, itself not among them
        self.remembered: dict[int, int] = {}  # position → entry
        self._known: dict[tuple[int, int, frozenset[int]], int] = {}
        self.last = (0, -1)  # token and position that the next tick reads
        self.pending = False  # whether it waits for its row

    def read(self, ids: Sequence[int], positions: Sequence[int]) -> list[int]:
        """Entries of tokens read together. A row at the position of one of them is hidden."""
        entries = [0] * len(ids)
        fresh: list[int] = []
        asked = set(positions)
        rows = [(p, entry) for p, entry in self.remembered.items() if p not in asked]
        for index in sorted(range(len(ids)), key=positions.__getitem__):
            where = positions[index]
            seen = frozenset(fresh).union(entry for p, entry in rows if p < where)
            entries[index] = self._enter(ids[index], where, seen)
            fresh.append(entries[index])
        return entries

    def remember(self, ids: Sequence[int], positions: Sequence[int]) -> list[int]:
        """The same, and keeps their rows."""
        entries = self.read(ids, positions)
        self.remembered.update(zip(positions, entries, strict=True))
        self.last, self.pending = (ids[-1], positions[-1]), False
        return entries

    def forget(self, positions: Sequence[int]) -> None:
        """Drops rows. If the last token's own row is among them, the newest one left is last."""
        for position in positions:
            del self.remembered[position]
        if not self.pending and self.last[1] not in self.remembered:
            newest = max(self.remembered)
            self.last = (self.tokens[self.remembered[newest]], newest)

    def tick(self, token: int) -> int:
        """The entry that foretells a fed token."""
        read_token, where = self.last
        (entry,) = self.read([read_token], [where])
        if self.pending:
            self.remembered[where] = entry
        self.last, self.pending = (token, where + 1), True
        return entry

    def _enter(self, token: int, position: int, seen: frozenset[int]) -> int:
        entry = self._known.setdefault((token, position, seen), len(self.tokens))
        if entry == len(self.tokens):
            self.tokens.append(token)
            self.positions.append(position)
            self.seen.append(seen)
        return entry

    @torch.no_grad()
    def logits(self, model: Model) -> Tensor:
        """Of every entry: [entries, vocab] float32."""
        size = len(self.tokens)
        ids = torch.tensor([self.tokens])
        plain = self.positions == list(range(size)) and all(
            len(seen) == index for index, seen in enumerate(self.seen)
        )
        if plain:
            return model(ids, use_cache=False).logits[0].float()  # type: ignore[no-any-return]
        visible = torch.eye(size, dtype=torch.bool)
        for index, seen in enumerate(self.seen):
            visible[index, sorted(seen)] = True
        mask = torch.zeros(size, size, dtype=model.dtype)
        mask.masked_fill_(~visible, torch.finfo(model.dtype).min)
        output = model(
            ids,
            attention_mask=mask[None, None],
            position_ids=torch.tensor([self.positions]),
            use_cache=False,
        )
        return output.logits[0].float()  # type: ignore[no-any-return]


def reference_run(model: Model, script: Script) -> Observed:
    """What the reference makes of the script."""
    rows: list[Label] = []
    tokens: list[Label] = []
    logits: list[Tensor] = []
    surprises: list[Tensor] = []
    context = _Context()
    read: list[int] = []  # entries of the context whose logits are wanted
    foretold: list[tuple[int | None, int]] = []  # entry before it, token

    def conclude() -> None:
        if not context.tokens:
            return
        computed = context.logits(model)
        logits.append(computed[read])
        for before, token in foretold:
            if before is None:
                surprises.append(torch.zeros(1))
            else:
                surprises.append(-torch.log_softmax(computed[before].double(), 0)[token][None])

    for number, step in enumerate(script):
        if isinstance(step, Prime):
            conclude()
            context, read, foretold = _Context(), [], []
            entries = context.remember(step.ids, range(len(step.ids)))
            foretold += zip([None, *entries[:-1]], step.ids, strict=True)
            tokens += labels(number, step.ids, range(len(step.ids)))
        elif isinstance(step, Feed):
            for token in step.ids:
                foretold.append((context.tick(token), token))
                tokens.append(Label(number, *context.last))
        elif isinstance(step, Cull):
            context.forget(step.positions)
        elif isinstance(step, Read):
            ids, positions = step.ids, step.positions
            if not ids:
                ids, positions = (context.last[0],), (context.last[1],)
            read += context.read(ids, positions)
            rows += labels(number, ids, positions)
    conclude()
    return Observed(
        rows, torch.cat(logits), tokens, torch.cat([torch.empty(0), *surprises]).float()
    )
