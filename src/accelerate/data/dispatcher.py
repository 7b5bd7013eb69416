"""The loader `prepare` returns when rank 0 reads for all.

Owns the steps of rank 0 and the others; how batches are cut is in `data.cutting`, how they become bytes in
`data.packing`, what ranks tell each other besides in `data.protocol`.

[Note: the protocol]
A pass begins with an announcement, an object broadcast from rank 0: the layouts of the messages to come and how many
rows each data shard gets, `None` when there is no batch at all, or a `Failure`. Then each step is one scatter of equal
byte buffers. Each buffer begins with a header that says what comes next: a message of the same layout, another
announcement, or nothing, because this was the last batch; and how many rows were read for this step, from which each
rank knows what is padding. So a steady step costs one collective, whatever the batch holds. Rank 0 reads one batch
ahead to know. An error on rank 0 is announced like a layout; every rank raises it at the same step. Where a step can
not be packed after its layout went out, an empty buffer goes in its place, and the announcement follows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch

from ..core.enums import RNGType
from ..runtime import state
from ..runtime.accumulation import GradientState
from ..runtime.ops import send_to_device
from ..runtime.partial_state import PartialState
from ..runtime.rng import synchronize_rng_states
from ..runtime.state import Runtime
from . import borders
from .agreement import settle_left
from .cutting import Cut, Cutter, Shares, count_rows
from .loader import NOTHING, DataLoaderAdapter, placement
from .loop import DataLoaderStateMixin
from .packing import Layout, allocate, pack, read_header, unpack
from .position import Place
from .protocol import (
    ANNOUNCED,
    CLOSED,
    FAILED,
    LAST,
    SAME,
    Announcement,
    Closed,
    Failure,
    Pass,
    announce,
    dispatch_error,
    out_of_step,
)
from .samplers import known_batch_size
from .shards import Padding, mesh_data_shard


@dataclass(frozen=True)
class _Step:
    """One global step on rank 0: what each data shard gets."""

    cut: Cut
    coming: Announcement
    tensors: list[list[torch.Tensor]]

    @staticmethod
    def of(cut: Cut) -> _Step:
        described = [Layout.describe(piece) for piece in cut.pieces]
        coming = Announcement([layout for layout, _ in described], cut.shares)
        return _Step(cut, coming, [tensors for _, tensors in described])


class _Given(NamedTuple):
    """One step on this rank."""

    batch: Any
    next_comes: int
    observed: int
    """Rows that were read for it; -1 if it has none."""

    padding: Padding | None = None


class DataLoaderDispatcher(DataLoaderAdapter, DataLoaderStateMixin):
    """A loader that reads on rank 0 and sends each process its slice.

    All processes must iterate it together; each step is collective. They must also leave a loop at the same step.

    Args:
        dataset: What to load from. Only rank 0's is read.
        split_batches: Cut each batch into parts, in place of joining one batch for each process and cutting that.
        skip_batches: How many steps to leave out, in every pass.
        use_stateful_dataloader: Use torchdata's `StatefulDataLoader`.
        slice_fn: Cuts a batch, called as `slice_fn(batch, slice, process_index=i, num_processes=n)` on rank 0 for
            each process; by default rows of dimension 0.
        torch_device_mesh: A mesh; processes that differ along tp, cp, sp or pp only get the same slice.
        iteration: The number of the first pass.
        **kwargs: Further arguments of `torch.utils.data.DataLoader`.
    """

    looks_ahead = True
    agreement = None
    """Nothing to agree on: rank 0 knows when the pass ends."""

    def __init__(
        self,
        dataset: Any,
        split_batches: bool = False,
        skip_batches: int = 0,
        use_stateful_dataloader: bool = False,
        _drop_last: bool = False,
        _non_blocking: bool = False,
        slice_fn: Callable[..., Any] | None = None,
        torch_device_mesh: Any = None,
        iteration: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(dataset, use_stateful_dataloader=use_stateful_dataloader, **kwargs)
        self.split_batches = split_batches
        self.skip_batches = skip_batches
        self.gradient_state = GradientState()
        self.slice_fn = slice_fn
        self.torch_device_mesh = torch_device_mesh
        self.iteration = iteration
        self._drop_last = _drop_last
        self._non_blocking = _non_blocking
        # Set by `prepare`: where batches go, if not to the process's own device, and which random generators are made
        # equal on all ranks when a pass begins.
        self.device: torch.device | str | int | None = None
        self.rng_types: Sequence[str | RNGType] | None = None
        self._scratch: tuple[torch.Tensor, torch.Tensor] | None = None
        self._pass = Pass()

    @property
    def shard_index(self) -> int:
        """Which data shard this process gets."""
        process = state.current_or_single().process
        return shards_of_ranks(process.world_size, self.torch_device_mesh)[process.rank]

    @property
    def state(self) -> PartialState:
        """Who this process is."""
        return PartialState()

    @property
    def submesh_tp(self) -> Any:
        """The mesh's axis of tensor parallelism, or `None`."""
        return self._submesh("tp")

    @property
    def submesh_dp(self) -> Any:
        """The mesh's axis `dp`, or `None`."""
        return self._submesh("dp")

    @property
    def submesh_fsdp(self) -> Any:
        """The mesh's axis `fsdp`, or `None`."""
        return self._submesh("fsdp")

    def _submesh(self, axis: str) -> Any:
        mesh = self.torch_device_mesh
        return mesh[axis] if mesh is not None and axis in (mesh.mesh_dim_names or ()) else None

    def __iter__(self) -> Iterator[Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.look_around()
        return self._walk()

    def _walk(self) -> Iterator[Any]:
        watch = borders.before_pass(self)
        runtime = state.current_or_single()
        settle_left(self.gradient_state)
        place, mark = self._placement(runtime), self._mark
        self._close_broken_pass(runtime)
        pending, loads = self._take_pending()
        self.begin()
        try:
            self._set_samplers_epoch(self.iteration)
            for given in self._steps(runtime, pending):
                mark.given += 1
                if given.next_comes == LAST:
                    self.end_of_dataloader = mark.finished = True
                    self.remainder = given.observed
                mark.padding = given.padding
                mark.steps_given += 1
                if watch is not None:
                    borders.give(self, watch)
                yield given.batch if place is None else place(given.batch)
                if mark.loads != loads:
                    self._check_loads(loads)
                if watch is not None:
                    borders.after_body(self, watch)
        except GeneratorExit:
            if mark.finished:  # zip, for example, does not ask for more than it needs
                mark.close()
            self.leave()
            if (
                watch is not None and not watch.is_closed
            ):  # an iterator may outlive the modules at the end of the process
                borders.end(self, watch)
            raise
        except BaseException:
            self.end()
            raise
        mark.close()
        self.adjust_state_dict_for_prefetch()
        self.end()
        if watch is not None:
            borders.end(self, watch)

    def _placement(self, runtime: Runtime) -> Callable[[Any], Any] | None:
        if self.device is None or torch.device(self.device) == runtime.device:
            return placement(runtime.device, self._non_blocking)
        return partial(send_to_device, device=torch.device(self.device), non_blocking=self._non_blocking)

    def _steps(self, runtime: Runtime, pending: Place | None) -> Iterator[_Given]:
        shard_of = shards_of_ranks(runtime.process.world_size, self.torch_device_mesh)
        if len(shard_of) == 1:
            return self._read_alone(pending)
        if runtime.process.rank == 0:
            return self._serve(runtime, shard_of, pending)
        return self._receive(runtime, pending)

    def _read_alone(self, pending: Place | None) -> Iterator[_Given]:
        """One process: only look one ahead."""
        cutter = Cutter(count=1, split=True, drop_last=self._drop_last, slice_fn=self.slice_fn)
        batches = (batch for batch, _, _ in self._reader.read(pending, ahead=True))
        current = next(batches, NOTHING)
        while current is not NOTHING:
            self.adjust_state_dict_for_prefetch()
            following = next(batches, NOTHING)
            rows = count_rows(current) if following is NOTHING or self.global_batch is not None else None
            cut = None if self.slice_fn is None else cutter.cut([current])
            piece = current if cut is None else cut.pieces[0]
            observed = -1 if rows is None else rows
            padding = None if self.global_batch is None else Shares((observed,), observed).padding(observed, self._full)
            yield _Given(piece, LAST if following is NOTHING else SAME, observed, padding)
            current = following

    @property
    def _full(self) -> int | None:
        """How many rows a shard gets in a full step, where each step's have to be known."""
        return None if self.global_batch is None else self.global_batch.batch_size

    def _serve(self, runtime: Runtime, shard_of: list[int], pending: Place | None) -> Iterator[_Given]:
        """Rank 0. See [Note: the protocol]."""
        collectives, own = runtime.collectives, shard_of[0]
        # Where batches need no transfer, rank 0 keeps its own piece.
        received_here = placement(runtime.device, False) is not None
        steps = self._read_steps(max(shard_of) + 1, pending)
        current = self._pass
        announced: Announcement | None = None
        step, error = _next_step(steps)
        self._synchronize(pending)
        while step is not None:
            if step.coming != announced:
                announced = step.coming
                error = announce(runtime, announced, shard_of)
                if error is not None:
                    break
            following, error = _next_step(steps, self.adjust_state_dict_for_prefetch)
            if following is None and error is None:
                next_comes = LAST
            else:
                next_comes = SAME if following is not None and following.coming == announced else ANNOUNCED
            cut = step.cut
            message, failed = self._send(runtime, step, (next_comes, cut.observed), shard_of, keep=not received_here)
            if failed is not None:
                error = failed
                break
            current.advance(next_comes, message.numel())
            piece = unpack(message, step.coming.layouts[own]) if received_here else cut.pieces[own]
            yield _Given(piece, next_comes, cut.observed, cut.shares.padding(cut.observed, self._full))
            step = following
        current.next_comes = LAST
        if error is not None:
            failure = Failure.of(error)
            collectives.broadcast_object(failure)
            raise dispatch_error(failure) from error
        if announced is None:
            collectives.broadcast_object(None)

    def _send(
        self,
        runtime: Runtime,
        step: _Step,
        header: tuple[int, int],
        shard_of: list[int],
        *,
        keep: bool,
    ) -> tuple[torch.Tensor, Exception | None]:
        """Scatter one step; return what rank 0 got, or why there was nothing to send.

        With `keep` rank 0 has its piece already and sends itself nothing.
        """
        device = runtime.device
        size = max([layout.num_bytes for layout in step.coming.layouts])
        failed: Exception | None = None
        try:
            if keep:
                if self._scratch is None or self._scratch[0].numel() != size:
                    self._scratch = allocate(size, device), allocate(size, device)
                own, output = self._scratch
            else:
                own, output = pack(header, step.tensors[shard_of[0]], size, device), allocate(size, device)
            packed: dict[int, torch.Tensor] = {}
            messages = [own]
            for shard in shard_of[1:]:
                if shard not in packed:
                    packed[shard] = pack(header, step.tensors[shard], size, device)
                messages.append(packed[shard])
        except Exception as error:  # noqa: BLE001 - told to all ranks, which wait for this message, then raised on each
            failed, output = error, allocate(size, device)
            messages = [pack((FAILED, -1), [], size, device)] * len(shard_of)
        return runtime.collectives.scatter(output, messages), failed

    def _receive(self, runtime: Runtime, pending: Place | None) -> Iterator[_Given]:
        """Every other rank. See [Note: the protocol]."""
        collectives, rank = runtime.collectives, runtime.process.rank
        current = self._pass
        self._reader.open_without_reading(pending)
        self._synchronize(pending)
        next_comes, coming, size = ANNOUNCED, None, 0
        while next_comes != LAST:
            if next_comes == ANNOUNCED:
                news: Announcement | Failure | Closed | None = collectives.broadcast_object(None)
                if isinstance(news, Closed):
                    raise out_of_step(rank, current.step, news.step)
                if isinstance(news, Failure):
                    current.next_comes = LAST
                    raise dispatch_error(news)
                if news is None:
                    return
                coming, size = news, max(layout.num_bytes for layout in news.layouts)
            assert coming is not None  # the first header is preceded by an announcement
            message = collectives.scatter(allocate(size, runtime.device), None)
            next_comes, observed = read_header(message)
            if next_comes == FAILED:
                next_comes = ANNOUNCED  # there is no batch in it
                continue
            if next_comes == CLOSED:
                raise out_of_step(rank, current.step, observed)
            current.advance(next_comes, size)
            padding = coming.shares.padding(observed, self._full)
            yield _Given(unpack(message, coming.layouts[rank]), next_comes, observed, padding)

    def _synchronize(self, pending: Place | None) -> None:
        # After rank 0 has begun to read: that draws random numbers which the other ranks do not. Where a place was
        # restored, the generators were too.
        if self.rng_types and pending is None:
            synchronize_rng_states(self.rng_types)

    def _close_broken_pass(self, runtime: Runtime) -> None:
        """Agree that the pass before this one was broken off at the same step everywhere. See [Note: breaking out].

        Raises:
            DispatchError: On a rank that took another number of steps than rank 0.
        """
        before, self._pass = self._pass, Pass()
        if before.next_comes == LAST:
            return
        device, collectives, ranks = runtime.device, runtime.collectives, runtime.process.world_size
        serves = runtime.process.rank == 0
        if before.next_comes == ANNOUNCED:
            news = collectives.broadcast_object(Closed(before.step) if serves else None)
            theirs = news.step if isinstance(news, Closed) else None
        else:
            closing = [pack((CLOSED, before.step), [], before.size, device)] * ranks if serves else None
            found, step = read_header(collectives.scatter(allocate(before.size, device), closing))
            theirs = step if found == CLOSED else None
        if theirs != before.step:
            raise out_of_step(runtime.process.rank, before.step, theirs)

    def adjust_state_dict_for_prefetch(self) -> None:
        """Take the state for resuming before a batch is read ahead; only rank 0 reads, and only it has one."""
        if state.current_or_single().process.rank == 0:
            super().adjust_state_dict_for_prefetch()

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the current pass, counting only batches that the loop was given."""
        if state.current_or_single().process.rank == 0:
            return super().state_dict()
        return {"position": self.position_state()}

    def own_state(self) -> dict[str, Any] | None:
        """Return torchdata's state of the reading; only rank 0 reads."""
        return super().own_state() if state.current_or_single().process.rank == 0 else None

    @property
    def reads_per_step(self) -> int:
        """How many batches rank 0 reads for one step."""
        return 1 if self.split_batches else self._num_shards

    def steps_of(self, batches: int) -> int:
        """Return how many steps are made of so many batches."""
        if self._drop_last and not self.split_batches:
            return batches // self.reads_per_step
        return -(-batches // self.reads_per_step)

    def batches_ahead(self) -> int | None:
        """Return how many batches of the pass follow the one given last; `None` if that is not known."""
        return 0 if self.end_of_dataloader else None

    @property
    def _num_shards(self) -> int:
        return max(shards_of_ranks(state.current_or_single().process.world_size, self.torch_device_mesh)) + 1

    def _read_steps(self, count: int, pending: Place | None) -> Iterator[_Step]:
        """Read and cut batches for `count` data shards."""
        cutter = Cutter(
            count=count,
            split=self.split_batches,
            drop_last=self._drop_last,
            slice_fn=self.slice_fn,
            spread=self.global_batch is not None,
        )
        reads = self.reads_per_step
        kept = 0 if self._drop_last or count == 1 else reads
        batches = (batch for batch, _, _ in self._reader.read(pending, ahead=True, kept=kept))
        while group := list(islice(batches, reads)):
            cutter.remember_opening(self._reader.opening or group)
            if self._drop_last and not self.split_batches and len(group) < count:
                continue
            cut = cutter.cut(group)
            if cut is not None:
                yield _Step.of(cut)

    def __len__(self) -> int:
        length = super().__len__()
        if not self.split_batches:
            length = length // self._num_shards if self._drop_last else -(-length // self._num_shards)
        return max(0, length - self.skip_batches)

    def set_epoch(self, epoch: int) -> None:
        """Make `epoch` the number of the next pass, for samplers and datasets whose order depends on it.

        A place in the middle of a pass that `load_state` restored is kept if it is in this epoch, and given up if not.
        """
        if epoch != self.iteration:
            self._mark.pending = None
        self.iteration = epoch
        self._set_samplers_epoch(epoch)

    @property
    def total_batch_size(self) -> int:
        """Number of samples all processes get in one step.

        Raises:
            SettingError: (a `ValueError`) if batches have no fixed size.
        """
        size = self.batch_size if self.batch_size is not None else getattr(self.index_sampler, "batch_size", None)
        return known_batch_size(size, self.index_sampler) * (1 if self.split_batches else self._num_shards)

    @property
    def full_batch_size(self) -> int | None:
        """Number of samples this process gets in a full step; `None` if batches have no fixed size."""
        size = self.batch_size if self.batch_size is not None else getattr(self.index_sampler, "batch_size", None)
        return size // self._num_shards if size is not None and self.split_batches else size

    @property
    def total_dataset_length(self) -> int:
        """Number of samples in the dataset."""
        dataset: Any = self.dataset
        return len(dataset)


def shards_of_ranks(world_size: int, mesh: Any) -> list[int]:
    """Return, for each rank, the data shard it reads; `mesh` is the loader's, or `None`."""
    if mesh is None or not mesh.mesh_dim_names:
        return list(range(world_size))
    shards = [0] * world_size
    for coordinate in (mesh.mesh >= 0).nonzero().tolist():
        rank = int(mesh.mesh[tuple(coordinate)])
        shards[rank] = mesh_data_shard(mesh.mesh_dim_names, tuple(mesh.mesh.shape), coordinate)[0]
    return shards


def _next_step(
    steps: Iterator[_Step], before: Callable[[], None] | None = None
) -> tuple[_Step | None, Exception | None]:
    try:
        if before is not None:
            before()
        return next(steps, None), None
    except Exception as error:  # noqa: BLE001 - any error of a dataset; told to all ranks, then raised on each
        return None, error
