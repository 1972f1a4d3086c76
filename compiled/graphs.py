"""Which graphs exist, and proof that there are no others.

A tick is two graphs: its step, which reads and chooses, and its patch. A brain needs a fixed set of
them, and ``Graphs.table`` lists it in the order of warm-up: the step for every bucket and the patch
of a tick; where it looks up what may come next, the search, and the step and the patch of several
tokens; the read alone for every width and bucket; for every width above 1 the surprise and the
patch of an edit; and, where it may renumber positions, re-basing. Compiled, each of them is
captured once (``capture.py``): a graph break or a second compilation of any is an error, not a slow
path. Eager, the same functions are called at exactly the width asked for.

Some work is never captured, because capturing would take a thousand times as long as the call or
would not make it faster: reads wider than any width of the set, a prompt's chunks among them, and
what is done once, to begin with a text or to go on from a save. :class:`Uncaptured` does that.

This module does not know what a tick is, except that ``begin_step`` starts one.
"""

import contextlib
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from compiled import draw_cpu, read_cpu, tick_cpu, torch_private
from compiled.blocks import Blocks
from compiled.capture import Capturing, Graph
from compiled.choose import Choice, Eviction, Forced, choose
from compiled.cpu_library import Libraries
from compiled.llama import LlamaConfig, Weights
from compiled.lookup import Lookup, Proposal, propose
from compiled.patch import make_empty, patch, rebase
from compiled.plan import EditPlan, Plan, empty_edit
from compiled.read import (
    AheadReading,
    ChunkReading,
    Reading,
    ScoredPrefill,
    read,
    read_ahead,
    read_chunk,
    scored_prefill,
)
from compiled.read_cpu import Decode
from compiled.sample import Sampling, SamplingMethod, surprises
from compiled.score import IN_TENSORS
from compiled.speculate import Accepted, choose_ahead
from compiled.state import Cursor, State

CUDA_GRAPH_WARMUP_RUNS = 3
"""A CUDA graph runs once to warm up, once to record, and only then is replayed."""

WARM_UP, READ, CHOOSE = "warm-up", "1 read", "1 sample, 2 score, 3 decide"
"""The ranges that a profiler shows: around the capture of graphs, and within a step that is not
captured."""

Key = tuple[str, int, int]
"""A graph of the table: its kind, how many tokens it takes, and its bucket; 0 where it has none."""

PROPOSE: Key = ("propose", 0, 0)
REBASE: Key = ("rebase", 0, 0)

Ranges = Callable[[str], AbstractContextManager[Any]]
"""Opens a range of that name, in which a profiler shows what happens."""


@dataclass(frozen=True)
class GraphSpec:
    """What shapes the graphs of one brain, beside its model and its tensors."""

    compiled: bool
    method: SamplingMethod
    eviction: Eviction
    widths: tuple[int, ...] = (1, 16)  # tokens per captured read, ascending from 1
    smallest_bucket: int = 1024  # slots
    chunk: int | None = None  # most tokens that are read to be committed; None: the widest width
    rebases: bool = False  # whether positions are ever renumbered
    lookup: Lookup | None = None  # how to look up what may come next; None: never

    def __post_init__(self) -> None:
        """Raises ValueError, beginning with the name of what is wrong."""
        widths = self.widths
        if len(widths) < 2 or widths[0] != 1 or list(widths) != sorted(set(widths)):
            raise ValueError(f"widths must ascend from 1, like [1, 16], not {list(widths)}")
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


class Graphs:
    """The functions of ``compiled/`` bound to one brain's tensors, eager or captured.

    Attributes: ``table``, every graph there can be, in the order of warm-up (empty when eager);
    ``uncaptured``, the same work called directly; ``one``, [] int64, the length of a tick's read;
    ``ranges``, opened around every graph: set it to watch them in a profiler.
    """

    def __init__(
        self,
        spec: GraphSpec,
        config: LlamaConfig,
        weights: Weights,
        state: State,
        cursor: Cursor,
        sampling: Sampling,
        *,
        libraries: Libraries | None = None,
        kernels: bool = False,
        ends: frozenset[int] = frozenset(),
        capturing: Capturing = contextlib.nullcontext,
    ) -> None:
        """Binds the functions; compiles nothing yet.

        Args:
            spec: What shapes the graphs.
            config: The model's dimensions.
            weights: Its weights.
            state: The memory.
            cursor: Its cursor.
            sampling: Settings of the draw.
            libraries: Of the CPU operators that stand for the layers in reads of a few tokens, for
                the draw and, where nothing is captured, for the rest of a tick; if any.
            kernels: Whether reads of a few tokens and ticks are made by Triton kernels, on a GPU.
            ends: Tokens that end a text: none of them is ever proposed.
            capturing: Opened around the compilation of every graph, with its name.
        """
        self.spec, self.config = spec, config
        self.weights, self.state, self.cursor, self.sampling = weights, state, cursor, sampling
        self.compiled = spec.compiled
        self.device = state.valid.device
        self.buckets = buckets(state.capacity, spec.smallest_bucket)
        fitting = tuple(width for width in spec.widths[1:] if width <= state.capacity)
        self.edit_widths = fitting or (state.capacity,)
        self.widths = tuple(sorted({1, *self.edit_widths}))
        self.decode, self._widest = self._operator(libraries, kernels=kernels)
        self._kernels = kernels
        # A kernel is compiled for every width and bucket: of those there are few, of texts many.
        of_texts = None if kernels else self.decode
        self.uncaptured = Uncaptured(config, weights, state, cursor, of_texts, self._widest)
        self.ranges: Ranges = contextlib.nullcontext
        self.one = torch.ones((), dtype=torch.int64, device=self.device)
        shaping: dict[str, Any] = {"method": spec.method, "eviction": spec.eviction}
        draw = None if libraries is None else draw_cpu.operator(libraries.draw)
        steps = tick_cpu.Steps(IN_TENSORS, patch)
        if libraries is not None and not spec.compiled:
            steps = tick_cpu.steps(libraries.tick)
        shaping |= {"native": draw, "scoring": steps.scoring}
        self._choose_ahead: Callable[..., Accepted] = partial(choose_ahead, **shaping)
        self._patch_tick = steps.patch
        if kernels:  # of a tick alone: they take one token
            from compiled import tick_cuda

            ours = tick_cuda.steps(config.vocab_size, state, patch)
            self._patch_tick = ours.patch
            knows = tick_cuda.knows(spec.method, config.vocab_size)
            shaping |= {"native": ours.draw if knows else None, "scoring": ours.scoring}
        self._choose: Callable[..., Choice] = partial(choose, **shaping)
        self._propose: Callable[..., Proposal] = partial(
            propose,
            lookup=spec.lookup,  # type: ignore[arg-type]  # never called without one
            ends=tuple(sorted(ends)),
        )
        self._rebase = partial(rebase, config.layer_kinds)
        self.table: dict[Key, Graph] = {}
        self._of_edits: set[Key] = set()
        if spec.compiled:
            functions: dict[Key, Callable[..., Any]] = dict(self._tick_functions())
            edits = dict(self._edit_functions())
            self._of_edits = edits.keys() - functions.keys()
            functions |= edits
            # Captured on CUDA, it would keep room for a second cache of keys; called, for a layer.
            if spec.rebases and self.device.type != "cuda":
                functions[REBASE] = self._rebase
            self.table = {
                # Beside kernels of our own, what is left is many small ones.
                key: Graph(_name(key), function, self.device, capturing, joined=kernels)
                for key, function in functions.items()
            }
            # Without the mark, replays would copy these into graph memory, cache included.
            for tensor in (*weights.tensors(), *state, *cursor, *sampling, self.one):
                torch_private.keep_address(tensor)

    def _operator(self, libraries: Libraries | None, *, kernels: bool) -> tuple[Decode | None, int]:
        """The operator that stands for the layers, if any, and the most tokens that it is for."""
        if kernels:
            from compiled import read_cuda  # needs Triton

            most = min(read_cuda.MOST_TOKENS, self.state.capacity)
            return read_cuda.operator(self.config, self.weights, self.state, most), most
        if libraries is not None:
            return read_cpu.operator(libraries.read), read_cpu.MOST_TOKENS
        return None, 0

    def _decode_for(self, num_tokens: int) -> Decode | None:
        """The operator for a read of so many tokens, if any."""
        return self.decode if num_tokens <= self._widest else None

    def _bucket(self, high_water: int) -> int:
        """The smallest one that holds every row below ``high_water``."""
        return self.buckets[bisect_left(self.buckets, high_water)]

    def _direct(self, num_tokens: int, high_water: int) -> dict[str, Any]:
        """Bucket and operator of a read that is not captured."""
        decode, bucket = self._decode_for(num_tokens), high_water
        if self._kernels:  # each bucket is a program more
            bucket = self._bucket(high_water)
        elif decode is not None:
            bucket = max(1, high_water)
        return {"bucket": bucket, "decode": decode}

    def _tick_functions(self) -> Iterator[tuple[Key, Callable[..., Any]]]:
        lookup = self.spec.lookup
        for bucket in self.buckets:
            reads = partial(read, self.config, bucket=bucket, decode=self._decode_for(1))
            yield ("step", 1, bucket), partial(_step, reads, self._choose)
            yield ("patch tick", 1, 0), self._patch_tick
            if lookup is not None:
                yield PROPOSE, self._propose
        if lookup is None:
            return
        width = 1 + lookup.width
        for bucket in self.buckets:
            decode = self._decode_for(width)
            ahead = partial(read_ahead, self.config, bucket=bucket, decode=decode)
            yield ("step", width, bucket), partial(_step_ahead, ahead, self._choose_ahead)
            yield ("patch tick", width, 0), patch

    def _edit_functions(self) -> Iterator[tuple[Key, Callable[..., Any]]]:
        for width in self.widths:
            for bucket in self.buckets:
                reads = partial(read, self.config, bucket=bucket, decode=self._decode_for(width))
                yield ("read", width, bucket), reads
                if width in self.edit_widths:
                    yield ("surprise", width, 0), surprises
                    yield ("patch edit", width, 0), patch

    @property
    def captured(self) -> dict[str, Graph]:
        """The graphs that have been compiled, by name."""
        return {graph.name: graph for graph in self.table.values() if graph.compilations}

    @property
    def chunk(self) -> int:
        """The most tokens that one read takes when a text is committed. Of matrices in blocks it is
        what the operator takes: without it they would be made float32 every time.
        """
        in_blocks = isinstance(self.weights.qkv, Blocks)
        return min(self.patched, self._widest or self.patched) if in_blocks else self.patched

    @property
    def patched(self) -> int:
        """The most rows that one patch writes, or erases."""
        return min(self.spec.chunk or self.widths[-1], self.state.capacity)

    def is_captured(self, num_tokens: int) -> bool:
        """Whether reads and edits of this many tokens are captured, padded to a width."""
        return self.compiled and num_tokens <= self.widths[-1]

    def begin_step(self) -> None:
        """Marks the start of a step for CUDA graphs: before a read, never between it and the
        patch that consumes it. Invalidates everything the previous step returned.
        """
        if self.compiled and self.device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]

    def read_width(self, num_tokens: int) -> int:
        """The width that a read of this many tokens is padded to: its own if not captured."""
        if not self.is_captured(num_tokens):
            return num_tokens
        return self.widths[bisect_left(self.widths, num_tokens)]

    def edit_width(self, num_tokens: int) -> int:
        """The same for the read and the patch of an edit."""
        if not self.is_captured(num_tokens):
            return num_tokens
        return self.edit_widths[bisect_left(self.edit_widths, num_tokens)]

    def read(
        self, tokens: Tensor, positions: Tensor, length: Tensor, *, high_water: int
    ) -> Reading:
        """Reads over the smallest bucket that holds every row below ``high_water``.

        Args:
            tokens: [T] int64.
            positions: [T] int64.
            length: [] int64, how many of them are asked for.
            high_water: One more than the highest slot that may hold a row.
        """
        width, bound = len(tokens), (self.weights, self.state)
        if not self.is_captured(width):
            direct = self._direct(width, high_water)
            return read(self.config, *bound, tokens, positions, length, **direct)
        graph = self.table["read", width, self._bucket(high_water)]
        if not graph.compilations:
            # The cursor's tensors are marked as never moving: a graph that is first called with
            # them would expect its tokens there for ever.
            tokens, positions, length = tokens + 0, positions + 0, length + 0
        with self.ranges(graph.name):
            reading: Reading = graph(*bound, tokens, positions, length)
        return reading

    def step(self, forced: Forced, *, high_water: int) -> tuple[Reading, Choice]:
        """Reads the cursor's token, and chooses what follows.

        Args:
            forced: [1] each.
            high_water: One more than the highest slot that may hold a row.
        """
        state, cursor, sampling = self.state, self.cursor, self.sampling
        if not self.compiled:
            with self.ranges(READ):
                asked = (cursor.token, cursor.position, self.one)
                direct = self._direct(1, high_water)
                reading = read(self.config, self.weights, state, *asked, **direct)
            with self.ranges(CHOOSE):
                return reading, self._choose(state, cursor, reading, sampling, forced)
        graph = self.table["step", 1, self._bucket(high_water)]
        with self.ranges(graph.name):
            made: tuple[Reading, Choice] = graph(
                self.weights, state, cursor, self.one, sampling, forced
            )
        return made

    def patch(self, plan: Plan | EditPlan) -> None:
        """Carries out a tick's plan, or an edit's, padded to a captured width."""
        if not self.compiled:
            if isinstance(plan, Plan):
                self._patch_tick(self.state, self.cursor, plan)
            else:
                patch(self.state, self.cursor, plan)
            return
        kind = "patch tick" if isinstance(plan, Plan) else "patch edit"
        graph = self.table[kind, plan.keys.shape[2], 0]
        with self.ranges(graph.name):
            graph(self.state, self.cursor, plan)

    def propose(self) -> Proposal:
        """Looks up what may follow, in memory that no graph writes to again: the proposal may
        outlive the step.
        """
        if not self.compiled:
            return self._propose(self.state, self.cursor)
        graph = self.table[PROPOSE]
        with self.ranges(graph.name):
            proposal: Proposal = graph(self.state, self.cursor)
        if self.device.type != "cuda":
            return proposal  # what a graph returns there is new every time
        return Proposal(*(tensor.clone() for tensor in proposal))

    def step_ahead(
        self, proposal: Proposal, forced: Forced, *, high_water: int
    ) -> tuple[AheadReading, Accepted]:
        """Reads the cursor's token and those proposed behind it, and chooses after each: as many
        ticks as come true. ``forced`` [T] each.
        """
        state, cursor, sampling = self.state, self.cursor, self.sampling
        width = 1 + len(proposal.tokens)
        if not self.compiled:
            with self.ranges(READ):
                asked = (self.weights, state, cursor, *proposal)
                direct = self._direct(width, high_water)
                reading = read_ahead(self.config, *asked, **direct)
            with self.ranges(CHOOSE):
                given = (state, cursor, proposal, reading, sampling, forced)
                return reading, self._choose_ahead(*given)
        graph = self.table["step", width, self._bucket(high_water)]
        with self.ranges(graph.name):
            made: tuple[AheadReading, Accepted] = graph(
                self.weights, state, cursor, proposal, sampling, forced
            )
        return made

    def scored_prefill(
        self,
        tokens: Tensor,
        positions: Tensor,
        length: Tensor,
        targets: Tensor,
        *,
        high_water: int,
    ) -> ScoredPrefill:
        """Reads a text that is to be committed, and scores what follows each of its tokens.

        Args:
            tokens: [T] int64, T a captured ``edit_width``.
            positions: [T] int64, ascending.
            length: [] int64, how many of them are asked for.
            targets: [T] int64, the token after each.
            high_water: One more than the highest slot that may hold a row.
        """
        reading = self.read(tokens, positions, length, high_water=high_water)
        nats = self.surprises(reading.logits, targets)
        return ScoredPrefill(nats, reading.new_keys, reading.new_values)

    def surprises(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Surprise of the tokens of a captured edit: logits [T, vocab], targets [T] → [T] nats."""
        graph = self.table["surprise", len(targets), 0]
        with self.ranges(graph.name):
            nats: Tensor = graph(logits, targets)
        return nats

    def rebase(self, *, wanted: bool = True) -> None:
        """Renumbers positions densely and turns the keys; does nothing where it is not wanted."""
        flag = torch.full((), wanted, dtype=torch.bool, device=self.device)
        with self.ranges(REBASE[0]):
            self.table.get(REBASE, self._rebase)(
                self.state, self.cursor, self.weights.inverse_frequencies, flag
            )

    @property
    def reach(self) -> int:
        """The most rows whose novelty changes when a text is appended."""
        return min(self.spec.eviction.novelty.reach, self.state.capacity)

    def empty_edit(self, width: int = 0, scored: ScoredPrefill | None = None) -> EditPlan:
        """A plan of this brain that changes nothing; see :func:`compiled.plan.empty_edit`."""
        return empty_edit(self.config, self.state, self.cursor, width, self.reach, scored)

    def expected(self, *, edits: bool = True) -> tuple[str, ...]:
        """Names of all graphs that this brain can ever need, in order of warm-up; without
        ``edits`` all but theirs. None in eager mode.
        """
        return tuple(
            graph.name for key, graph in self.table.items() if edits or key not in self._of_edits
        )

    # Warm-up

    def warm_up(self, *, edits: bool = True) -> Iterator[str]:
        """Captures every graph, yielding each one's name before it is compiled. Without ``edits``
        those of ticks alone: any other is captured when it is first needed.

        Rehearses every sequence of graphs that a tick or an edit runs, because CUDA graphs are
        recorded by sequence. Leaves every byte of the state and the cursor as it was: reads write
        nothing, and the patches are empty. Does nothing in eager mode.
        """
        if not self.compiled:
            return
        with self.ranges(WARM_UP):
            for graph in self._rehearsals(edits=edits):
                if not graph.compilations:
                    yield graph.name

    def _rehearsals(self, *, edits: bool) -> Iterator[Graph]:
        """Everything a brain does, with nothing in it; yields each graph before it is called."""
        runs = range(CUDA_GRAPH_WARMUP_RUNS if self.device.type == "cuda" else 1)
        for bucket in self.buckets:
            for _ in runs:
                yield from self._rehearse_tick(bucket)
        if self.spec.lookup is not None:
            for bucket in self.buckets:
                for _ in runs:
                    yield from self._rehearse_ahead(1 + self.spec.lookup.width, bucket)
            for _ in runs:
                self.begin_step()
                self.propose()
        for width in self.widths if edits else ():
            for bucket in self.buckets:
                for _ in runs:
                    yield from self._rehearse_edit(width, bucket)
            for _ in runs if width in self.edit_widths else ():
                self.begin_step()  # an edit that only forgets reads nothing first
                self.patch(self.empty_edit(width))
        for _ in runs if REBASE in self.table else ():
            yield self.table[REBASE]
            self.begin_step()
            self.rebase(wanted=False)

    def _rehearse_tick(self, bucket: int) -> Iterator[Graph]:
        yield self.table["step", 1, bucket]
        self.begin_step()
        zero = self._zeros(1)
        reading, choice = self.step(Forced(zero, zero.to(torch.uint8)), high_water=bucket)
        yield self.table["patch tick", 1, 0]
        self._rehearse_patch(choice.plan(reading))
        if self.spec.lookup is not None:
            yield self.table[PROPOSE]
            self.propose()

    def _rehearse_ahead(self, width: int, bucket: int) -> Iterator[Graph]:
        proposal = Proposal(self._zeros(width - 1), self._zeros())
        zeros = self._zeros(width)
        yield self.table["step", width, bucket]
        self.begin_step()
        forced = Forced(zeros, zeros.to(torch.uint8))
        reading, accepted = self.step_ahead(proposal, forced, high_water=bucket)
        yield self.table["patch tick", width, 0]
        self._rehearse_patch(accepted.plan(reading))
        self.propose()

    def _rehearse_patch(self, plan: Plan) -> None:
        make_empty(self.state, self.cursor, plan)
        self.patch(plan)

    def _rehearse_edit(self, width: int, bucket: int) -> Iterator[Graph]:
        yield self.table["read", width, bucket]
        self.begin_step()
        zeros = self._zeros(width)
        reading = self.read(zeros, zeros.add(0), self._zeros(), high_water=bucket)
        if width not in self.edit_widths:
            return
        yield self.table["surprise", width, 0]
        # Held until the patch is done, as an edit holds it: a CUDA graph remembers what was gone.
        nats = self.surprises(reading.logits, zeros)
        scored = ScoredPrefill(nats, reading.new_keys, reading.new_values)
        yield self.table["patch edit", width, 0]
        self.patch(self.empty_edit(width, scored))

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int64, device=self.device)


class Uncaptured:
    """What edits and chunks need of :class:`Graphs`, called directly at exactly the width asked
    for: for texts, a save to go on from, and reads too wide to be captured.
    """

    def __init__(
        self,
        config: LlamaConfig,
        weights: Weights,
        state: State,
        cursor: Cursor,
        decode: Decode | None,
        widest: int,
    ) -> None:
        """``decode``: the operator, if any, for reads of at most ``widest`` tokens."""
        self._bound = (config, weights, state)
        self._cursor, self._decode, self._widest = cursor, decode, widest

    def _decode_for(self, num_tokens: int) -> Decode | None:
        return self._decode if num_tokens <= self._widest else None

    def is_captured(self, num_tokens: int) -> bool:
        """Never."""
        return False

    def edit_width(self, num_tokens: int) -> int:
        """The number itself."""
        return num_tokens

    def scored_prefill(
        self,
        tokens: Tensor,
        positions: Tensor,
        length: Tensor,
        targets: Tensor,
        *,
        high_water: int,
    ) -> ScoredPrefill:
        """As :meth:`Graphs.scored_prefill`."""
        decode = self._decode_for(len(tokens))
        bucket = high_water if decode is None else max(1, high_water)
        given = (*self._bound, tokens, positions, length, targets)
        return scored_prefill(*given, bucket=bucket, decode=decode)

    def read_chunk(
        self, tokens: Tensor, positions: Tensor, targets: Tensor, *, high_water: int
    ) -> ChunkReading:
        """Reads a chunk of a text that is to be followed as several ticks are; all [T] int64."""
        given = (*self._bound, tokens, positions, targets)
        decode = self._decode_for(len(tokens))
        return read_chunk(*given, bucket=max(1, high_water), decode=decode)

    def patch(self, plan: Plan | EditPlan) -> None:
        """Carries a plan out, padded or not."""
        patch(self._bound[2], self._cursor, plan)


def _step(
    read: Callable[..., Reading],
    choose: Callable[..., Choice],
    weights: Weights,
    state: State,
    cursor: Cursor,
    one: Tensor,
    sampling: Sampling,
    forced: Forced,
) -> tuple[Reading, Choice]:
    """A read of the cursor's token and the choice after it, as one function to be captured."""
    reading = read(weights, state, cursor.token, cursor.position, one)
    return reading, choose(state, cursor, reading, sampling, forced)


def _step_ahead(
    read_ahead: Callable[..., AheadReading],
    choose_ahead: Callable[..., Accepted],
    weights: Weights,
    state: State,
    cursor: Cursor,
    proposal: Proposal,
    sampling: Sampling,
    forced: Forced,
) -> tuple[AheadReading, Accepted]:
    """The same of several tokens."""
    reading = read_ahead(weights, state, cursor, *proposal)
    return reading, choose_ahead(state, cursor, proposal, reading, sampling, forced)


def _name(key: Key) -> str:
    """A graph's name, as reports and profilers show it."""
    kind, width, bucket = key
    if key in (PROPOSE, REBASE):
        return kind
    if kind.startswith("patch"):
        return f"{kind} W={width}"
    return f"{kind} T={width}" + (f" bucket={bucket}" if bucket else "")
