"""All of a checkpoint, or nothing.

Owns the order in which a folder becomes visible, the only one that survives a crash at any moment:

    every rank writes aside -> every rank hears whether all succeeded -> everything is flushed to the disk
    -> one rename -> the parent folder is flushed -> every rank hears that it is done

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
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import xxhash

from ..collectives.base import Collectives
from ..core.errors import AccelerateError, CheckpointError, SettingError, explain
from . import durable, layout


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


class _Journal(msgspec.Struct):
    """Beside a complete state inside an older one: what has to go."""

    folder: str
    remove: list[str]


_STILL_WHOLE = "Either the state that was there before or the new one is whole; loading finds out which."


def nothing(_: Path) -> Iterable[str]:
    """Return no names: what `staged` removes unless told otherwise."""
    return ()


def no_finish(_: Path) -> None:
    """Do nothing before the rename."""


@contextmanager
def staged(
    final: Path,
    collectives: Collectives,
    *,
    leads: bool | None = None,
    fresh: bool = False,
    stale: Callable[[Path], Iterable[str]] = nothing,
    finish: Callable[[Path], None] = no_finish,
) -> Iterator[Path]:
    """Give all ranks a folder to write into that becomes `final` when all have succeeded.

    Called on all ranks; collective: three exchanges of one small object. Blocks until the slowest rank has
    written. If any rank fails, `final` is as it was.

    Args:
        final: Where the files shall appear.
        collectives: How ranks tell each other.
        leads: Whether this rank creates and renames folders on its disk. Rank 0 does unless told; with disks
            that nodes do not share, one rank of each node has to.
        fresh: Refuse a destination that exists.
        stale: Asked on a leading rank for the files of an older state to remove from an existing destination.
        finish: Called on a leading rank when all ranks have written, with the folder.

    Raises:
        CheckpointError: On all ranks, naming each rank that failed and why.
        SettingError: On all ranks, if `fresh` and the destination exists.
    """
    final = Path(os.path.abspath(final))
    leads = collectives.rank == 0 if leads is None else leads
    area = _begin(final, collectives, leads, fresh)
    done = False
    try:
        failure: Exception | None = None
        try:
            yield area.staging
        except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks have to hear of it before it leaves
            failure = error
        _agree(collectives, failure, f"The checkpoint {final} was not written", "What was there before is untouched.")
        if leads:
            failure = _attempt(lambda: _publish(area, final, stale, finish))
        _agree(collectives, failure, f"The checkpoint {final} was not put in place", _STILL_WHOLE)
        done = True
    finally:
        if leads and not done:
            shutil.rmtree(area.root, ignore_errors=True)


def _attempt(action: Callable[[], None]) -> Exception | None:
    try:
        action()
    except Exception as error:  # noqa: BLE001 - as above: the other ranks are waiting for the outcome
        return error
    return None


def _begin(final: Path, collectives: Collectives, leads: bool, fresh: bool) -> _Area:
    report = _Report(collectives.rank, leads, socket.gethostname())
    if leads:
        try:
            inside = _prepare(final, fresh)
            report = _Report(collectives.rank, leads, report.host, inside)
        except AccelerateError as error:
            report = _Report(collectives.rank, leads, report.host, error=error)
        except Exception as error:  # noqa: BLE001 - the other ranks are waiting for the outcome
            report = _Report(collectives.rank, leads, report.host, failure=_describe(error))
    reports: list[_Report] = collectives.all_gather_object(report)
    for found in reports:
        if found.error is not None:
            raise found.error
    _raise_failures(reports, f"The checkpoint {final} cannot be begun", "What was there before is untouched.")
    return _area(final, leader_of(report, reports).inside)


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
    area = _area(final, inside)
    _remove(area.root)
    area.staging.mkdir(parents=True)
    return inside


def _publish(area: _Area, final: Path, stale: Callable[[Path], Iterable[str]], finish: Callable[[Path], None]) -> None:
    finish(area.staging)
    if not area.inside:
        durable.flush_tree(area.staging)
        os.rename(area.staging, final)
        durable.flush_folder(final.parent)
        area.root.rmdir()
        return
    written = set(durable.files_below(area.staging))
    for name in written:
        _check_replaceable(final, name)
    journal = _Journal(area.staging.name, sorted(set(stale(final)) - written))
    (area.root / layout.JOURNAL_NAME).write_bytes(msgspec.json.encode(journal))
    durable.flush_tree(area.root)
    os.rename(area.root, final / layout.COMMIT_NAME)
    durable.flush_folder(final)
    recover(final)


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


def _check_inside(final: Path, name: str) -> None:
    parent = (final / name).parent.resolve()
    if not layout.is_inside(name) or not parent.is_relative_to(final.resolve()):
        raise CheckpointError(explain(f"{name!r} leads out of {final}.", remedy="Do not trust this checkpoint."))


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
    _move_into_place(waiting.source, final, waiting.remove)
    return True


@dataclass(frozen=True)
class Pending:
    """A complete state inside a folder that was not moved into place yet."""

    source: Path
    """Where its files are that have not been moved."""
    remove: list[str]
    """Files of the older state that have to go."""


def pending(final: Path) -> Pending | None:
    """Return the state that `recover` would move into place. Changes nothing.

    Raises:
        CheckpointError: If the interrupted save is damaged.
    """
    root = final / layout.COMMIT_NAME
    if not root.is_dir():
        return None
    try:
        journal = msgspec.json.decode((root / layout.JOURNAL_NAME).read_bytes(), type=_Journal)
    except (OSError, msgspec.DecodeError) as error:
        if not any(path.is_dir() for path in root.iterdir()):
            return None
        raise CheckpointError(
            explain(f"{root} is an interrupted save without a readable journal: {error}", remedy="Move it away.")
        ) from error
    source = root / journal.folder
    if not layout.is_file_name(journal.folder) or source.is_symlink():
        raise CheckpointError(explain(f"{root} names the folder {journal.folder!r}.", remedy="Do not trust it."))
    return Pending(source, journal.remove)


def _move_into_place(source: Path, final: Path, remove: list[str]) -> None:
    moving = list(durable.files_below(source)) if source.is_dir() else []
    for name in (*remove, *moving):
        _check_inside(final, name)
    for name in remove:
        (final / name).unlink(missing_ok=True)
    changed = {final}
    for name in moving:
        target = final / name
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(source / name, target)
        changed.add(target.parent)
    for folder in sorted(changed, reverse=True):
        durable.flush_folder(folder)
    # The journal last: without it the rest could not be finished.
    shutil.rmtree(source, ignore_errors=True)
    shutil.rmtree(final / layout.COMMIT_NAME)


def rotate(folders: Path, total_limit: int | None, newest: str) -> list[str]:
    """Remove the oldest automatically named checkpoints beyond the limit. Call when `newest` is durable.

    What crashed processes left there goes too. Each one leaves under another name first, so that a crash never
    leaves half a checkpoint under its own.

    Raises:
        OSError: If something could not be removed. Leftovers do not keep checkpoints from being removed.
    """
    names = [path.name for path in folders.iterdir()]
    stuck: OSError | None = None
    for name in names:
        if name.startswith((layout.REMOVING_PREFIX, layout.SAVING_NAME)):
            try:
                _remove(folders / name)
            except OSError as error:
                stuck = error
    removed = layout.plan_rotation(names, total_limit, newest)
    for name in removed:
        aside = folders / f"{layout.REMOVING_PREFIX}{name}"
        os.rename(folders / name, aside)
        shutil.rmtree(aside)
    if stuck is not None:
        raise stuck
    return removed


def _remove(path: Path) -> None:
    """Remove a file, a link or a folder with all in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _agree(collectives: Collectives, failure: Exception | None, problem: str, remedy: str) -> None:
    """Return if no rank has failed; otherwise raise on all ranks. Collective."""
    own = _Report(collectives.rank, False, "", failure=_describe(failure) if failure else None)
    reports = collectives.all_gather_object(own)
    if failure is not None and collectives.world_size == 1 and isinstance(failure, AccelerateError):
        raise failure
    _raise_failures(reports, problem, remedy, failure)


def _raise_failures(reports: list[_Report], problem: str, remedy: str, cause: Exception | None = None) -> None:
    failed = [f"rank {report.rank}: {report.failure}" for report in reports if report.failure is not None]
    if failed:
        raise CheckpointError(explain(f"{problem}. What failed: {'; '.join(failed)}", remedy=remedy)) from cause


@contextmanager
def together(collectives: Collectives, problem: str) -> Iterator[None]:
    """Let no rank go on when another one failed in this block. Collective at its end.

    A failing rank raises its own error, the others a `CheckpointError` that names it.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:  # noqa: BLE001 - raised again below, when the others know
        failure = error
    own = _Report(collectives.rank, False, "", failure=_describe(failure) if failure else None)
    reports = collectives.all_gather_object(own)
    if failure is not None:
        raise failure
    _raise_failures(reports, problem, "See the error of that rank.")
