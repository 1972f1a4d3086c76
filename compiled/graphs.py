"""Which graphs exist, and proof that there are no others.

A brain needs a fixed set of graphs: the read for every (width, bucket), the choice, the patch of
a tick, and for every width above 1 the patch of an edit and the surprise of its tokens; if it looks
up what may come next, the search, and the read, the choice and the patch of several tokens; and, if
it may renumber positions, re-basing. With
``engine="compiled"`` each is captured once by ``torch.compile(fullgraph=True, dynamic=False)``: in
CUDA-graph mode on CUDA, through Inductor alone on a CPU. A graph break or a second compilation of
any of them is an error, not a slow path. With ``engine="eager"`` the same functions are called
directly, at the exact width asked for; so are reads wider than any that is captured, a prefill's
chunks among them: they are bound by their products, which capture does not make faster, and
without it they read exactly the rows there are instead of a whole bucket. What is done ``once``, to
begin with a text or to go on from a save, is called directly, too, however short it is: capturing
would take a thousand times as long as the call.

This module does not know what a tick is, except that ``begin_step`` starts one.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from compiled import torch_private
from compiled.capture import Graph
from compiled.choose import Choice, Conduct, Forced, choose
from compiled.llama import LlamaConfig, Weights
from compiled.lookup import Lookup, Proposal, propose
from compiled.patch import Plan, make_empty, patch, rebase
from compiled.plan import empty_edit
from compiled.read import AheadReading, Reading, ScoredPrefill, read, read_ahead, scored_prefill
from compiled.read_cpu import Decode, operator
from compiled.sample import Sampling, SamplingMethod, surprises
from compiled.speculate import Said, choose_ahead
from compiled.state import Cursor, State

CUDA_GRAPH_WARMUP_RUNS = 3
"""A CUDA graph runs once to warm up, once to record, and only then is replayed."""


TICK, EDIT, CHOOSE, PROPOSE, REBASE = "tick", "edit", "choose", "propose", "rebase"

Naming = Callable[[str], AbstractContextManager[Any]]
"""Opens a range of a name in which a profiler shows what happens."""

Returned = TypeVar("Returned")


@dataclass(frozen=True)
class Behaviour:
    """Everything but tensors that shapes the graphs of one brain."""

    config: LlamaConfig
    method: SamplingMethod
    conduct: Conduct
    widths: tuple[int, ...] = (1, 16)  # tokens per captured read, ascending from 1
    smallest_bucket: int = 1024  # slots
    chunk: int | None = None  # most tokens that are read to be committed; None: the widest width
    rebases: bool = False  # whether positions are ever renumbered
    lookup: Lookup | None = None  # how to look up what may come next; None: never
    native: Path | None = None  # library with a CPU's decode operator; None: as the compiler does

    def __post_init__(self) -> None:
        """Raises ValueError for widths or a bucket that cannot form a set."""
        widths = self.widths
        if len(widths) < 2 or widths[0] != 1 or list(widths) != sorted(set(widths)):
            raise ValueError(f"widths must be ascending and start 1, N, …, not {list(widths)}")
        if self.smallest_bucket < 1:
            raise ValueError(f"smallest_bucket must be at least 1, not {self.smallest_bucket}")
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"chunk must be at least 1, not {self.chunk}")


def buckets(capacity: int, smallest: int) -> tuple[int, ...]:
    """Prefix lengths of the capacity axis that have graphs: powers of two from ``smallest`` up,
    and the capacity itself. Every bucket is at most the capacity.
    """
    sizes = []
    size = 1 << (smallest - 1).bit_length()
    while size < capacity:
        sizes.append(size)
        size *= 2
    return (*sizes, capacity)


def smallest_at_least(sizes: tuple[int, ...], needed: int) -> int:
    """The first of the ascending sizes that holds ``needed``. Raises ValueError if none does."""
    for size in sizes:
        if size >= needed:
            return size
    raise ValueError(f"{needed} is more than the largest of {sizes}")


class Graphs:
    """The functions of ``compiled/`` bound to one brain's tensors, eager or captured.

    Holds no state of its own besides the record of compilations. ``naming`` is for profilers: set
    it, and every call of a graph is a range with the graph's name.
    """

    def __init__(
        self,
        behaviour: Behaviour,
        weights: Weights,
        state: State,
        cursor: Cursor,
        sampling: Sampling,
        *,
        compiled: bool,
    ) -> None:
        self.behaviour = behaviour
        self.weights, self.state, self.cursor, self.sampling = weights, state, cursor, sampling
        self.compiled = compiled
        self.buckets = buckets(state.capacity, behaviour.smallest_bucket)
        fitting = tuple(width for width in behaviour.widths[1:] if width <= state.capacity)
        self.edit_widths = fitting or (state.capacity,)
        self.widths = tuple(sorted({1, *self.edit_widths}))
        self.device = state.valid.device
        self.captures: dict[str, Graph] = {}
        self.naming: Naming | None = None
        native = behaviour.native if compiled else None
        self._decode = None if native is None else operator(native)
        if compiled:
            # Without the mark, replays would copy these into graph memory, cache included.
            for tensor in (*weights.tensors(), *state, *cursor, *sampling):
                torch_private.keep_address(tensor)

    @property
    def chunk(self) -> int:
        """The most tokens that one read and one patch take when a text is committed."""
        return min(self.behaviour.chunk or self.widths[-1], self.state.capacity)

    def is_captured(self, num_tokens: int) -> bool:
        """Whether reads and edits of this many tokens are captured, padded to a width."""
        return self.compiled and num_tokens <= self.widths[-1]

    def begin_step(self) -> None:
        """Marks the start of a step for CUDA graphs: before a read, never between it and the
        patch that consumes it. Invalidates everything the previous step returned.
        """
        if self.compiled and self.device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]

    def named(self, name: str, call: Callable[..., Returned], *arguments: Any) -> Returned:
        """The call, in a range of that name if anybody looks; otherwise the call alone."""
        if self.naming is None:
            return call(*arguments)
        with self.naming(name):
            return call(*arguments)

    def width_for(self, num_tokens: int) -> int:
        """The width that a read of this many tokens is padded to: its own if not captured."""
        captured = self.is_captured(num_tokens)
        return smallest_at_least(self.widths, num_tokens) if captured else num_tokens

    def edit_width_for(self, num_tokens: int, *, once: bool = False) -> int:
        """The same for a patch that edits; its own for one that is made ``once``."""
        captured = self.is_captured(num_tokens) and not once
        return smallest_at_least(self.edit_widths, num_tokens) if captured else num_tokens

    def read(
        self, tokens: Tensor, positions: Tensor, length: Tensor, *, high_water: int
    ) -> Reading:
        """``read`` over the smallest bucket that holds every row below ``high_water``."""
        asked = (tokens, positions, length)
        if not self.is_captured(tokens.shape[0]):
            return read(self.behaviour.config, self.weights, self.state, *asked, bucket=high_water)
        bucket = smallest_at_least(self.buckets, max(1, high_water))
        name = _read_name(tokens.shape[0], bucket)
        if name not in self.captures:
            # In a graph whose first call is a tick's, the cursor would be where tokens always are:
            # on CUDA, those of any other place would have it recorded again.
            asked = (tokens + 0, positions + 0, length + 0)
        bound = functools.partial(_bound_read, self.behaviour.config, bucket, self._decode)
        graph = self._graph(name, bound)
        reading: Reading = graph(self.weights, self.state, *asked)
        return reading

    def choose(self, reading: Reading, forced: Forced) -> Choice:
        """``choose`` after a read of one token."""
        graph = self._graph(CHOOSE, functools.partial(_bound_choose, self.behaviour))
        choice: Choice = graph(self.state, self.cursor, reading, self.sampling, forced)
        return choice

    def propose(self) -> Proposal:
        """``propose``, in memory that no graph writes to again: it may outlive the step."""
        assert self.behaviour.lookup is not None
        search = functools.partial(_bound_propose, self.behaviour.lookup)
        proposal: Proposal = self._graph(PROPOSE, search)(self.state, self.cursor)
        if self.state.valid.device.type != "cuda":
            return proposal  # what a graph returns there is new every time
        return Proposal(*(tensor.clone() for tensor in proposal))

    def read_ahead(self, proposal: Proposal, *, high_water: int) -> AheadReading:
        """``read_ahead`` over the same bucket as ``read``."""
        bucket = high_water
        if self.compiled:
            bucket = smallest_at_least(self.buckets, max(1, high_water))
        graph = self._graph(
            _ahead_names(1 + len(proposal.tokens), bucket)[0],
            functools.partial(_bound_read_ahead, self.behaviour.config, bucket, self._decode),
        )
        reading: AheadReading = graph(self.weights, self.state, self.cursor, *proposal)
        return reading

    def choose_ahead(self, proposal: Proposal, reading: AheadReading, forced: Forced) -> Said:
        """``choose_ahead`` after it."""
        graph = self._graph(
            _ahead_names(1 + len(proposal.tokens), 0)[1],
            functools.partial(_bound_choose_ahead, self.behaviour),
        )
        said: Said = graph(self.state, self.cursor, proposal, reading, self.sampling, forced)
        return said

    def study(
        self,
        tokens: Tensor,
        positions: Tensor,
        length: Tensor,
        targets: Tensor,
        *,
        high_water: int,
        once: bool = False,
    ) -> ScoredPrefill:
        """``study`` over the same bucket; where it is captured, a read and its surprises."""
        config, bound = self.behaviour.config, (self.weights, self.state, tokens, positions, length)
        captured = self.is_captured(tokens.shape[0])
        if not captured or (once and self._decode is None):
            return scored_prefill(config, *bound, targets, bucket=high_water)
        if once:
            reading = read(config, *bound, bucket=max(1, high_water), decode=self._decode)
            nats = surprises(reading.logits, targets)
        else:
            reading = self.read(tokens, positions, length, high_water=high_water)
            nats = self.surprises(reading.logits, targets)
        return ScoredPrefill(nats, reading.new_keys, reading.new_values)

    def surprises(self, logits: Tensor, targets: Tensor) -> Tensor:
        """``surprises`` of the tokens of a captured edit."""
        name = _names_after_read(targets.shape[0], EDIT)[0]
        nats: Tensor = self._graph(name, surprises)(logits, targets)
        return nats

    def patch(self, plan: Plan, *, once: bool = False) -> None:
        """``patch``: a tick's, or an edit's where the plan pins or erases."""
        width = plan.rows.token_id.shape[0]
        kind = TICK if plan.erase is None else EDIT
        captured = not once and (kind == TICK or self.is_captured(width))
        graph = self._graph(_names_after_read(width, kind)[1], patch) if captured else patch
        graph(self.state, self.cursor, plan)

    def rebase(self, *, wanted: bool = True) -> None:
        """``rebase``: renumbers positions densely and turns the keys."""
        flag = torch.full((), wanted, dtype=torch.bool, device=self.device)
        arguments = (self.state, self.cursor, self.weights.inverse_frequencies, flag)
        if self.device.type == "cuda":
            # Captured, it would keep room for a second cache of keys; as it is, for one layer.
            self.named(REBASE, rebase, *arguments)
        else:
            self._graph(REBASE, rebase)(*arguments)

    @property
    def _captures_rebase(self) -> bool:
        return self.behaviour.rebases and self.device.type != "cuda"

    def expected(self, *, edits: bool = True) -> tuple[str, ...]:
        """Names of all graphs that this brain can ever need, in order of warm-up; or those of ticks
        alone.
        """
        lookup = self.behaviour.lookup
        search = () if lookup is None else (PROPOSE,)
        names: list[str] = []
        for bucket in self.buckets:
            names += [_read_name(1, bucket), *_names_after_read(1, TICK), *search]
        if lookup is not None:
            for bucket in self.buckets:
                names += _ahead_names(1 + lookup.width, bucket)
        for width in self.edit_widths if edits else ():
            for bucket in self.buckets:
                names += [_read_name(width, bucket), *_names_after_read(width, EDIT)]
        return tuple(dict.fromkeys([*names, *([REBASE] if self._captures_rebase else [])]))

    def warm_up(self, *, edits: bool = True) -> Iterator[str]:
        """Captures every graph, yielding each one's name before it is compiled. Without ``edits``
        those of ticks alone: any other is captured when it is first needed.

        Rehearses every sequence of graphs that a tick or an edit runs, because CUDA graphs are
        recorded by sequence. Leaves every byte of the state and the cursor as it was: reads write
        nothing, and the patches are empty. Does nothing in eager mode.
        """
        if not self.compiled:
            return
        runs = CUDA_GRAPH_WARMUP_RUNS if self.device.type == "cuda" else 1
        for bucket in self.buckets:
            for _ in range(runs):
                yield from self._rehearse_tick(bucket)
        if self.behaviour.lookup is not None:
            yield from self._rehearse_lookup(self.behaviour.lookup.width, runs)
        for width in self.edit_widths if edits else ():
            for bucket in self.buckets:
                for _ in range(runs):
                    yield from self._rehearse_edit(width, bucket)
            for _ in range(runs):  # an edit that only forgets reads nothing first
                self.begin_step()
                self.patch(self.empty_edit(width))
        for _ in range(runs if self._captures_rebase else 0):
            yield from self._new(REBASE)
            self.begin_step()
            self.rebase(wanted=False)

    def empty_edit(self, width: int, learnt: ScoredPrefill | None = None) -> Plan:
        """``empty_edit`` of this brain."""
        return empty_edit(self.behaviour.config, self.state, self.cursor, width, learnt)

    def _rehearse_tick(self, bucket: int) -> Iterator[str]:
        """A tick in which nothing happens."""
        yield from self._new(_read_name(1, bucket))
        self.begin_step()
        reading = self.read(*self._nothing_to_read(1), high_water=bucket)
        choose_name, patch_name = _names_after_read(1, TICK)
        yield from self._new(choose_name)
        choice = self.choose(reading, self._nothing_forced())
        yield from self._new(patch_name)
        self._rehearse_patch(choice.plan(reading))
        if self.behaviour.lookup is not None:
            yield from self._new(PROPOSE)
            self.propose()

    def _rehearse_lookup(self, width: int, runs: int) -> Iterator[str]:
        """Ticks of several tokens in which nothing happens, and the search on its own."""
        nothing = self._nothing_to_read(width)[0]
        proposal = Proposal(nothing, torch.zeros((), dtype=torch.int64, device=self.device))
        forced = self._nothing_forced(1 + width)
        for bucket in self.buckets:
            read_name, choose_name, patch_name = _ahead_names(1 + width, bucket)
            for _ in range(runs):
                yield from self._new(read_name)
                self.begin_step()
                reading = self.read_ahead(proposal, high_water=bucket)
                yield from self._new(choose_name)
                said = self.choose_ahead(proposal, reading, forced)
                yield from self._new(patch_name)
                self._rehearse_patch(said.plan(reading))
                self.propose()
        for _ in range(runs):
            self.begin_step()
            self.propose()

    def _rehearse_patch(self, plan: Plan) -> None:
        """A tick's patch, of a plan that is made to change nothing."""
        make_empty(self.state, self.cursor, plan)
        self.patch(plan)

    def _rehearse_edit(self, width: int, bucket: int) -> Iterator[str]:
        """An edit that changes nothing."""
        yield from self._new(_read_name(width, bucket))
        self.begin_step()
        tokens, positions, length = self._nothing_to_read(width)
        reading = self.read(tokens, positions, length, high_water=bucket)
        surprise_name, patch_name = _names_after_read(width, EDIT)
        yield from self._new(surprise_name)
        # Held until the patch is done, as an edit holds it: a CUDA graph remembers what was gone.
        learnt = ScoredPrefill(
            self.surprises(reading.logits, tokens), reading.new_keys, reading.new_values
        )
        yield from self._new(patch_name)
        self.patch(self.empty_edit(width, learnt))

    def _new(self, name: str) -> Iterator[str]:
        if name not in self.captures:
            yield name

    def _nothing_to_read(self, width: int) -> tuple[Tensor, Tensor, Tensor]:
        zeros = torch.zeros(width, dtype=torch.int64, device=self.device)
        return zeros, zeros.add(0), torch.zeros((), dtype=torch.int64, device=self.device)

    def _nothing_forced(self, width: int = 1) -> Forced:
        zero = torch.zeros(width, dtype=torch.int64, device=self.device)
        return Forced(zero, zero.to(torch.uint8))

    def _graph(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        if not self.compiled:
            return function
        graph = self.captures.get(name)
        if graph is None:
            graph = self.captures[name] = Graph(name, function, self.device)
        return graph if self.naming is None else functools.partial(self.named, name, graph)


def _read_name(width: int, bucket: int) -> str:
    return f"read T={width} bucket={bucket}"


def _names_after_read(width: int, kind: str) -> tuple[str, str]:
    """What runs after a read in a tick or an edit: reckoning, then the patch."""
    reckoning = CHOOSE if kind == TICK else f"surprise T={width}"
    return reckoning, f"patch {kind} W={width}"


def _ahead_names(width: int, bucket: int) -> tuple[str, str, str]:
    """What a tick of several tokens runs: the read, the choice, the patch."""
    patch_name = _names_after_read(width, TICK)[1]
    return f"read ahead T={width} bucket={bucket}", f"{CHOOSE} T={width}", patch_name


def _bound_read(config: LlamaConfig, bucket: int, decode: Decode | None, *tensors: Any) -> Reading:
    return read(config, *tensors, bucket=bucket, decode=decode)


def _bound_choose(behaviour: Behaviour, *tensors: Any) -> Choice:
    return choose(*tensors, method=behaviour.method, conduct=behaviour.conduct)


def _bound_propose(lookup: Lookup, state: State, cursor: Cursor) -> Proposal:
    return propose(state, cursor, lookup)


def _bound_read_ahead(
    config: LlamaConfig, bucket: int, decode: Decode | None, *tensors: Any
) -> AheadReading:
    return read_ahead(config, *tensors, bucket=bucket, decode=decode)


def _bound_choose_ahead(behaviour: Behaviour, *tensors: Any) -> Said:
    return choose_ahead(*tensors, method=behaviour.method, conduct=behaviour.conduct)
