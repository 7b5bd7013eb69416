"""All of a checkpoint, or nothing.

Owns the order in which a folder becomes visible, the only one that survives a crash at any moment:

    every rank writes aside -> every rank hears whether all succeeded -> everything is flushed to the disk
    -> every rank hears whether all disks are ready -> one rename -> the parent folder is flushed
    -> every rank hears that it is done

A destination that does not exist yet appears by that rename, whole. One that exists keeps its files until a
complete new state lies inside it under `layout.COMMIT_NAME`: that rename is the decision. From then on the new
state is the one that counts, and `recover` moves it into place, now or when the next process looks at the
folder. Files of others in the destination are never touched, and neither are open files or a working directory
in it.

Called by `weights`, `session.save` and `session.load`.
"""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import msgspec
import xxhash

from ..collectives.base import Collectives, Exchange
from ..core.errors import AccelerateError, CheckpointError, SettingError, explain
from . import background, disk_errors, documents, durable, layout, manifest
from .files import File
from .manifest import FileEntry
from .writer import Writer


@dataclass(frozen=True)
class _Area:
    """Where one save writes aside."""

    root: Path
    staging: Path
    inside: bool
    """Whether the destination exists, and `root` is in it."""


@dataclass(frozen=True)
class _Report:
    """What one rank tells the others."""

    rank: int
    leads: bool
    host: str
    inside: bool = False
    error: AccelerateError | None = None
    failure: str | None = None
    news: Any = None


class _Journal(msgspec.Struct):
    """Beside a complete state inside an older one: what has to go, and what comes."""

    folder: str
    remove: list[str]
    place: list[str] = []


class _RankGone(CheckpointError):
    """Nothing was heard of another rank: it may have done its part, or not."""


_UNTOUCHED = "What was there before is untouched."
_STILL_WHOLE = "Either the state that was there before or the new one is whole; loading finds out which."


Stale = Callable[[Path, Collection[str]], Iterable[str]]
"""Given an existing destination and the names of the new files, returns the files of an older state that have to go.
Raises if they may not."""


def nothing(_: Path, __: Collection[str]) -> Iterable[str]:
    """Return no names: what `staged` removes unless told otherwise."""
    return ()


Finish = Callable[[Path, Mapping[str, FileEntry]], None]


def no_finish(_: Path, __: Mapping[str, FileEntry]) -> None:
    """Do nothing before the rename."""


class Staging:
    """One save on its way: a folder to write into, which becomes the destination when all ranks have succeeded."""

    def __init__(
        self,
        final: Path,
        collectives: Collectives,
        *,
        leads: bool | None = None,
        fresh: bool = False,
        stale: Stale = nothing,
    ) -> None:
        """Create the folder. Called on all ranks; collective: one exchange of one small object.

        Args:
            final: Where the files shall appear.
            collectives: How ranks tell each other.
            leads: Whether this rank creates and renames folders on its disk. Rank 0 does unless told; with disks
                that nodes do not share, one rank of each node has to.
            fresh: Refuse a destination that exists.
            stale: Asked on a leading rank what has to go from an existing destination.

        A save in the background that this process still writes is waited for.

        Raises:
            CheckpointError: On all ranks, naming each rank that failed and why.
            SettingError: On all ranks, if `fresh` and the destination exists.
        """
        background.settle()  # it may write aside where this one is going to
        self.final = Path(os.path.abspath(final))
        self.leads = collectives.rank == 0 if leads is None else leads
        self._stale = stale
        own, reports = _begin(self.final, collectives, self.leads, fresh)
        self._area = _area(self.final, leader_of(own, reports).inside)
        self._led = [report.rank for report in reports if leader_of(report, reports).rank == own.rank]
        self.folder = self._area.staging

    def complete(
        self, exchange: Exchange, files: Callable[[], Iterable[File]] = list, finish: Finish = no_finish
    ) -> None:
        """Write this rank's files, and put the folder in place if all ranks have written theirs.

        Called on all ranks, each with its own files; collective: three exchanges. Blocks until the slowest rank has
        written. If any rank failed, the destination is as it was.

        Args:
            exchange: How ranks tell each other; need not be what they began with.
            files: Returns what to write. May raise, and be collective.
            finish: Called on a leading rank when all ranks have written, with the folder, and the hashes of what
                the ranks at the same disk have written.

        Raises:
            CheckpointError: On all ranks, naming each rank that failed and why.
        """
        with self.undone_if_not_whole():
            failure, written = None, {}
            try:
                with Writer(self.folder) as writer:
                    writer.write(files())
                written = writer.entries
            except Exception as error:  # noqa: BLE001 - the other ranks have to hear of it before it leaves
                failure = error
            self._put_in_place(exchange, failure, written, finish)

    def fail(self, exchange: Exchange, failure: Exception) -> None:
        """Tell the other ranks, which call `complete`, that this one could not write; then raise as they do."""
        with self.undone_if_not_whole():
            self._put_in_place(exchange, failure, {}, no_finish)

    @contextmanager
    def kept_if_all_succeed(self, collectives: Collectives) -> Iterator[None]:
        """Let no rank go on to `complete` when another one failed in this block. Collective at its end."""
        with (
            self.undone_if_not_whole(),
            together(collectives, f"The checkpoint {self.final} was not begun", self.final),
        ):
            yield

    @contextmanager
    def undone_if_not_whole(self) -> Iterator[None]:
        """Remove what was written so far when this block fails."""
        try:
            yield
        except BaseException:
            if self.leads:
                shutil.rmtree(self._area.root, ignore_errors=True)
            raise

    def _put_in_place(
        self, exchange: Exchange, failure: Exception | None, written: dict[str, FileEntry], finish: Finish
    ) -> None:
        told = _agree(exchange, failure, self.final, "was not written", _UNTOUCHED, written)
        if self.leads:
            known = {name: entry for rank in self._led for name, entry in told[rank].items()}
            failure = _attempt(lambda: self._make_ready(known, finish))
        # With several disks, none may decide before all could.
        _agree(exchange, failure, self.final, "was not flushed to the disk", _UNTOUCHED)
        if self.leads:
            failure = _attempt(self._decide)
        try:
            _agree(exchange, failure, self.final, "was not put in place", _STILL_WHOLE)
        except _RankGone:
            raise
        except CheckpointError:
            if self.leads and failure is None and not self._area.inside:
                # It failed on another disk, where it is not there: nobody may take it for a whole one.
                os.rename(self.final, self._area.staging)
            raise
        if self.leads:
            shutil.rmtree(self._area.root, ignore_errors=True)

    def _make_ready(self, known: Mapping[str, FileEntry], finish: Finish) -> None:
        """Do all that can fail but the rename, and flush it."""
        area, final = self._area, self.final
        finish(area.staging, known)
        if area.inside:
            written = set(durable.files_below(area.staging))
            for name in written:
                _check_replaceable(final, name)
            stale = sorted(set(self._stale(final, written)) - written)
            for name in stale:  # now, not when it is decided: a folder that cannot be put in order is of no use
                _check_removable(final, name)
            journal = _Journal(area.staging.name, stale, sorted(written))
            with disk_errors.about(area.root / layout.JOURNAL_NAME):
                (area.root / layout.JOURNAL_NAME).write_bytes(msgspec.json.encode(journal))
        durable.flush_tree(area.root if area.inside else area.staging)

    def _decide(self) -> None:
        """Rename, which makes the new state the one that counts, and move it into place."""
        area, final = self._area, self.final
        if area.inside:
            os.rename(area.root, final / layout.COMMIT_NAME)
            recover(final)
            return
        os.rename(area.staging, final)
        try:
            durable.flush_folder(final.parent)
        except CheckpointError:
            os.rename(final, area.staging)  # all ranks will be told that it is not there
            raise


@contextmanager
def staged(
    final: Path,
    collectives: Collectives,
    *,
    fresh: bool = False,
    stale: Stale = nothing,
    finish: Finish = no_finish,
) -> Iterator[Path]:
    """Give all ranks a folder to write into that becomes `final` when all have succeeded.

    Called on all ranks; collective: four exchanges of one small object. See `Staging` for the rest.
    """
    staging = Staging(final, collectives, fresh=fresh, stale=stale)
    with staging.undone_if_not_whole():
        try:
            yield staging.folder
        except Exception as error:  # noqa: BLE001 - the other ranks have to hear of it before it leaves
            staging.fail(collectives, error)
        else:
            staging.complete(collectives, finish=finish)


def _attempt(action: Callable[[], None]) -> Exception | None:
    try:
        action()
    except Exception as error:  # noqa: BLE001 - as above: the other ranks are waiting for the outcome
        return error
    return None


def _begin(final: Path, collectives: Collectives, leads: bool, fresh: bool) -> tuple[_Report, list[_Report]]:
    report = _Report(collectives.rank, leads, socket.gethostname())
    if leads:
        try:
            inside = _prepare(final, fresh)
            report = _Report(collectives.rank, leads, report.host, inside)
        except AccelerateError as error:
            report = _Report(collectives.rank, leads, report.host, error=error)
        except Exception as error:  # noqa: BLE001 - the other ranks are waiting for the outcome
            report = _Report(collectives.rank, leads, report.host, failure=_describe(error, final))
    reports: list[_Report] = collectives.all_gather_object(report)
    for found in reports:
        if found.error is not None:
            raise found.error
    _raise_failures(reports, f"The checkpoint {final} cannot be begun", _UNTOUCHED)
    return report, reports


def leader_of(own: _Report, reports: list[_Report]) -> _Report:
    """Return the report of the rank that leads on this rank's disk: on this host, the nearest one before it."""
    leaders = [report for report in reports if report.leads]
    on_host = [report for report in leaders if report.host == own.host] or leaders
    before = [report for report in on_host if report.rank <= own.rank]
    return before[-1] if before else on_host[0]


def _area(final: Path, inside: bool) -> _Area:
    root = final / layout.SAVING_NAME if inside else final.parent / f"{layout.SAVING_NAME}-{_short(final.name)}"
    # The last part is the name of the destination: code that looks at it sees what it expects.
    return _Area(root, root / final.name, inside)


def _short(name: str) -> str:
    return xxhash.xxh3_64_hexdigest(os.fsencode(name))


def _prepare(final: Path, fresh: bool) -> bool:
    if fresh and final.exists():
        raise SettingError(
            explain(
                f"The checkpoint folder {final} exists already.",
                remedy="Set ProjectConfiguration.iteration past the last checkpoint, or load that one first.",
            )
        )
    if final.exists() and not final.is_dir():
        raise CheckpointError(explain(f"{final} is a file.", remedy="Give a folder to save into."))
    inside = final.is_dir()
    if inside:
        recover(final)
    else:
        durable.make_folder(final.parent)
    for was_inside in (True, False):  # what a process that was killed has left, beside a folder that was not there then
        _remove(_area(final, was_inside).root)
    _area(final, inside).staging.mkdir(parents=True)
    return inside


def _check_replaceable(final: Path, name: str) -> None:
    target = final / name
    blocker = next((parent for parent in target.parents if parent != final and parent.is_file()), None)
    if target.is_dir():
        blocker = target
    if blocker is not None:
        raise CheckpointError(
            explain(
                f"{blocker} is in the way of the new {name!r}: one is a file, the other a folder.", remedy="Move it."
            )
        )
    _check_inside(final, name)


def _check_removable(final: Path, name: str) -> None:
    if (final / name).is_dir():
        raise CheckpointError(
            explain(f"{final / name} was a file of the older state, and is a folder now.", remedy="Move it away.")
        )
    _check_inside(final, name)


def _check_inside(final: Path, name: str) -> None:
    if not layout.is_inside(name) or not (final / name).parent.resolve().is_relative_to(final.resolve()):
        raise CheckpointError(explain(f"{name[:200]!r} leads out of {final}.", remedy="Do not trust this checkpoint."))


def recover(final: Path) -> bool:
    """Finish a save whose process died between the decision and the last file.

    Called on one rank per disk, before anything else looks at the folder. May be cut off and repeated.

    Returns:
        Whether there was something to do.

    Raises:
        CheckpointError: If the interrupted save is damaged.
    """
    if not (final / layout.COMMIT_NAME).is_dir():
        return False
    waiting = pending(final)
    if waiting is None:
        shutil.rmtree(final / layout.COMMIT_NAME)
        return False
    with disk_errors.about(final):
        _move_into_place(waiting, final)
    return True


@dataclass(frozen=True)
class Pending:
    """A complete state inside a folder that was not moved into place yet."""

    source: Path
    """Where its files are that have not been moved."""
    remove: list[str]
    """Files of the older state that have to go."""
    place: list[str]
    """All files of the new state, moved or not."""


def pending(final: Path) -> Pending | None:
    """Return the state that `recover` would move into place. Changes nothing.

    Raises:
        CheckpointError: If the interrupted save is damaged.
    """
    root = final / layout.COMMIT_NAME
    if not root.is_dir():
        return None
    if root.is_symlink():
        raise CheckpointError(explain(f"{root} is a link to another folder.", remedy="Do not trust it."))
    file = root / layout.JOURNAL_NAME
    try:
        journal = documents.parse(documents.read_file(file), _Journal, file)
    except (OSError, CheckpointError) as error:
        if not any(path.is_dir() for path in root.iterdir()):
            return None
        raise CheckpointError(
            explain(f"{root} is an interrupted save without a readable journal: {error}", remedy="Move it away.")
        ) from error
    source = root / journal.folder
    if not layout.is_file_name(journal.folder) or source.is_symlink():
        raise CheckpointError(explain(f"{root} names the folder {journal.folder!r}.", remedy="Do not trust it."))
    return Pending(source, journal.remove, journal.place)


def _move_into_place(waiting: Pending, final: Path) -> None:
    source = waiting.source
    moving = list(durable.files_below(source)) if source.is_dir() else []
    placed = {*waiting.place, *moving}
    for name in (*waiting.remove, *placed):
        _check_inside(final, name)
    # All folders are flushed, also where nothing is left to do: an earlier attempt may have died before it flushed.
    # First, so that the decision is on the disk before anything follows from it, and folders before files move there.
    targets = _folders_of(final, placed)
    for folder in targets:
        folder.mkdir(exist_ok=True)
    _flush(targets)
    for name in waiting.remove:
        (final / name).unlink(missing_ok=True)
    for name in moving:
        os.replace(source / name, final / name)
    _flush(_folders_of(final, placed | set(waiting.remove)))
    shutil.rmtree(source, ignore_errors=True)
    # The journal last, on the disk too: without it the rest could not be finished.
    durable.flush_folder(final / layout.COMMIT_NAME)
    shutil.rmtree(final / layout.COMMIT_NAME)


def _folders_of(final: Path, names: Iterable[str]) -> list[Path]:
    """Return the folders of files below `final`, and those between, parents first."""
    return sorted({final, *(final / folder for name in names for folder in PurePath(name).parents)})


def _flush(folders: Iterable[Path]) -> None:
    for folder in folders:
        if folder.is_dir():
            durable.flush_folder(folder)


def rotate(folders: Path, total_limit: int | None, newest: str) -> list[str]:
    """Remove the oldest automatically named checkpoints beyond the limit. Call when `newest` is durable.

    What crashed processes left there goes too. Each one leaves under another name first, so that a crash never
    leaves half a checkpoint under its own.

    Raises:
        OSError, CheckpointError: If something could not be removed. Leftovers do not keep checkpoints from being removed.
    """
    names = [path.name for path in folders.iterdir()]
    stuck: OSError | None = None
    for name in names:
        if name.startswith((layout.REMOVING_PREFIX, layout.SAVING_NAME)):
            try:
                _remove(folders / name)
            except OSError as error:
                stuck = error
    removed = layout.plan_rotation(names, total_limit, newest, lambda name: manifest.is_whole(folders / name))
    aside = {name: folders / f"{layout.REMOVING_PREFIX}{name}" for name in removed}
    for name in removed:
        os.rename(folders / name, aside[name])
    if removed:
        durable.flush_folder(folders)  # otherwise a power cut may undo the renames, and not what follows
    for name in removed:
        shutil.rmtree(aside[name])
    if stuck is not None:
        raise stuck
    return removed


def _remove(path: Path) -> None:
    """Remove a file, a link or a folder with all in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _describe(error: BaseException, place: Path | None) -> str:
    return f"{type(error).__name__}: {(place and disk_errors.describe(error, place)) or error}"


def _agree(
    exchange: Exchange, failure: Exception | None, final: Path, problem: str, remedy: str, news: Any = None
) -> list[Any]:
    """Return what each rank brings as `news` if none has failed; otherwise raise on all ranks. Collective."""
    problem = f"The checkpoint {final} {problem}"
    own = _Report(exchange.rank, False, "", failure=_describe(failure, final) if failure else None, news=news)
    try:
        reports = exchange.all_gather_object(own)
    except RuntimeError as error:  # what torch raises when a connection breaks
        reason = _describe(failure or error, final).splitlines()[0]
        raise _RankGone(
            explain(
                f"{problem}: rank {exchange.rank} cannot reach another rank any more ({reason}).", remedy=_STILL_WHOLE
            )
        ) from (failure or error)
    if failure is not None and exchange.world_size == 1 and isinstance(failure, AccelerateError):
        raise failure
    _raise_failures(reports, problem, remedy, failure)
    return [report.news for report in reports]


def _raise_failures(reports: list[_Report], problem: str, remedy: str, cause: Exception | None = None) -> None:
    failed = [f"rank {report.rank}: {report.failure}" for report in reports if report.failure is not None]
    if failed:
        error = CheckpointError(explain(f"{problem}. What failed: {'; '.join(failed)}", remedy=remedy))
        error.arose_on = tuple(report.rank for report in reports if report.failure is not None)
        raise error from cause


@contextmanager
def together(collectives: Collectives, problem: str, place: Path | None = None) -> Iterator[None]:
    """Let no rank go on when another one failed in this block. Collective at its end.

    A failing rank raises its own error, the others a `CheckpointError` that names it.

    Args:
        collectives: How ranks tell each other.
        problem: What a failure means, for the message.
        place: What an error of the disk is about, where it does not say so itself.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:  # noqa: BLE001 - raised again below, when the others know
        failure = error
    own = _Report(collectives.rank, False, "", failure=_describe(failure, place) if failure else None)
    reports = collectives.all_gather_object(own)
    if failure is not None:
        raise failure
    _raise_failures(reports, problem, "See the error of that rank.")
