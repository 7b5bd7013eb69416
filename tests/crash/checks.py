"""The checks themselves: cut a save off in some way, look with fresh processes at what is left, and judge it."""

from __future__ import annotations

import pickle
import random
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from . import processes, program, tracing, watching
from .operations import Op, Tree, read_tree, write_tree
from .power import ALL, Disk, crashes
from .processes import Kill, Outcome
from .program import BESIDE, FOREIGN, NEW, NUMBERED, Digest, Place

STRACE, WATCH = "strace", "watch"


@dataclass
class Report:
    """What one check has found."""

    name: str
    counts: Counter[str] = field(default_factory=Counter)
    """How often the old state, the new one or none was found."""
    bad: list[str] = field(default_factory=list)
    cases: int = 0
    seconds: float = 0.0
    slowest: float = 0.0
    """The longest that a rank ran on after another one had died."""

    def add(self, case: str, state: str, problems: Sequence[str]) -> None:
        self.cases += 1
        self.counts[state] += 1
        if problems:
            self.bad.append(f"{case}: {'; '.join(problems)}")

    def __str__(self) -> str:
        counts = ", ".join(f"{number} {state}" for state, number in sorted(self.counts.items()))
        text = f"{self.name}: {self.cases} cases in {self.seconds:.0f} s ({counts}), {len(self.bad)} bad"
        return text + (f", ranks told within {self.slowest:.2f} s" if self.slowest else "")


class Timed:
    """Adds the time of a block to a report."""

    def __init__(self, report: Report) -> None:
        self.report = report

    def __enter__(self) -> Report:
        self.began = time.monotonic()
        return self.report

    def __exit__(self, *_: object) -> None:
        self.report.seconds += time.monotonic() - self.began


class Cell:
    """One kind of place, with the state that lies there, the one that is saved, and the one after that."""

    chunk = 25
    """How many folders one process loads from, one after the other."""

    def __init__(self, folder: Path, kind: str, ranks: int = 1, mode: str = "blocking") -> None:
        self.folder, self.kind, self.ranks, self.mode = folder.resolve(), kind, ranks, mode
        self.name = f"{kind}, {ranks} {'rank' if ranks == 1 else 'ranks'}, {mode}"
        root = self.folder / "reference"
        if kind == BESIDE:
            write_tree(root / "state", FOREIGN)
        else:
            root.mkdir(parents=True)
        self.old = None if kind == NEW else self._saved(root, 0)
        self.start: Tree = read_tree(root)
        self.new = self._saved(root, 1)
        self.next = self._saved(root, 2)
        self.finished = set(read_tree(root))

    def _saved(self, root: Path, generation: int) -> list[Digest]:
        """Save undisturbed; return what a fresh process loads on each rank. It should be what was saved."""
        saved = self.save(root, generation)
        loaded = self.run(program.load, root)
        for outcome in (*saved, *loaded):
            assert outcome.error is None, f"{self.name}: an undisturbed save or load failed: {outcome.error}"
        self.exact = [a.value for a in saved] == [b.value for b in loaded]
        return [outcome.value for outcome in loaded]

    def place(self, root: Path) -> Place:
        return Place(root, self.kind)

    def run(self, function: Any, root: Path, *args: Any, **options: Any) -> list[Outcome]:
        return processes.run(function, self.place(root), *args, ranks=self.ranks, **options)

    def save(self, root: Path, generation: int, **options: Any) -> list[Outcome]:
        return self.run(program.save, root, generation, self.mode, **options)

    def fresh(self, name: str) -> Path:
        """Return a folder with the old state."""
        root = self.folder / name
        shutil.rmtree(root, ignore_errors=True)
        write_tree(root, self.start)
        return root

    def judge_loaded(self, root: Path, values: Sequence[Any], must_be_new: bool) -> tuple[str, list[str]]:
        """Say which state was loaded, and what is wrong with that.

        Args:
            root: Where from.
            values: The digest of each rank, or the text of its error.
            must_be_new: Whether `save_state` had returned.
        """
        problems = []
        if self.kind == BESIDE:
            problems = [
                f"{name} of others is not what it was"
                for name, content in FOREIGN.items()
                if not (root / "state" / name).is_file() or (root / "state" / name).read_bytes() != content
            ]
        if values == self.new:
            return "new", problems
        if must_be_new:
            problems.append("save_state had returned, and the new state is not loaded")
        if values == self.old:
            return "old", problems
        errors = sorted({value for value in values if isinstance(value, str)})
        if errors and self.old is None:
            return "none", problems
        if errors:
            return "none", [*problems, *errors]
        return "mixed", [*problems, f"neither the old nor the new state: {self._mixture(values)}"]

    def _mixture(self, values: Sequence[Digest]) -> str:
        found = []
        for rank, value in enumerate(values):
            for part, digest in value.items():
                old = self.old is not None and digest == self.old[rank][part]
                new = digest == self.new[rank][part]
                found.append(f"rank {rank} {part} {'new' if new else 'old' if old else 'neither'}")
        return ", ".join(found)

    def each(self, function: Any, roots: Sequence[Path], *args: Any) -> list[list[Any]]:
        """Call a function of `program` for each folder, in processes that did not save it; return values or errors."""
        places = [self.place(root) for root in roots]
        outcomes = processes.run(program.many, function, places, *args, ranks=self.ranks) if len(places) > 1 else []
        values = [list(values) for values in zip(*(outcome.told for outcome in outcomes), strict=False)]
        for root in roots[len(values) :]:  # one of them has taken the process down
            values.append(_values(self.run(function, root, *args)))
        return values

    def judge(self, cases: Sequence[tuple[Path, bool]], again: int = 1) -> list[tuple[str, list[str]]]:
        """Load from each folder; and save on top of a copy of it, as a restarted script would, and load that.

        Args:
            cases: Folders, and whether `save_state` had returned.
            again: Save on top of one of so many.
        """
        copies = {root: root.with_name(f"{root.name}-copy") for root, _ in cases[::again]}
        for root, copy in copies.items():
            shutil.copytree(root, copy)
        loaded = self.each(program.load, [root for root, _ in cases])
        saved = dict(zip(copies, self.each(program.save, list(copies.values()), 2, self.mode), strict=True))
        reloaded = dict(zip(copies, self.each(program.load, list(copies.values())), strict=True))
        verdicts = []
        for (root, returned), values in zip(cases, loaded, strict=True):
            state, problems = self.judge_loaded(root, values, returned)
            if root in copies:
                problems += self._judge_next(copies[root], saved[root], reloaded[root])
            verdicts.append((state, problems))
        return verdicts

    def _judge_next(self, copy: Path, saved: Sequence[Any], loaded: Sequence[Any]) -> list[str]:
        if failed := [value for value in saved if isinstance(value, str)]:
            return [f"the next save failed: {failed[0]}"]
        problems = [] if loaded == self.next else [f"the next save is not what is loaded after it: {loaded}"]
        if left := set(read_tree(copy)) ^ self.finished:
            problems.append(f"left behind, or missing after the next save: {', '.join(sorted(left)[:4])}")
        return problems

    def points(self, victim: int, tool: str) -> list[Any]:
        """Return where one rank of a save can be killed."""
        root, log = self.fresh("logged"), self.folder / "log"
        if tool == STRACE:
            self.save(root, 1, attach=lambda pids: tracing.logged(log, pids, victim))
            return tracing.points(log.read_text(), root)
        count = watching.counted, victim, root, log
        processes.run(*count, program.save, self.place(root), 1, self.mode, ranks=self.ranks)
        return list(range(1, int(log.read_text()) + 1))

    def operations(self, tool: str) -> list[Op]:
        """Save undisturbed; return what that did to the disk."""
        root, log = self.fresh("logged"), self.folder / "log"
        if tool == STRACE:
            outcomes = self.save(root, 1, attach=partial(tracing.logged, log))
            ops = tracing.parse(log.read_text(), root)
        else:
            assert self.ranks == 1, "a process sees only its own changes"
            place = self.place(root)
            outcomes = processes.run(watching.recorded, root, log, program.save, place, 1, self.mode)
            ops = pickle.loads(log.read_bytes())
        assert all(outcome.error is None for outcome in outcomes), outcomes
        disk = Disk(self.start)
        for op in ops:
            disk.apply(op)
        assert disk.left(range(len(disk.pending)), {}, ALL) == read_tree(root), "the log does not tell all"
        return ops


def _values(outcomes: Sequence[Outcome]) -> list[Any]:
    return [
        "it hangs" if outcome.hung else outcome.error or outcome.value or "the process died" for outcome in outcomes
    ]


def kill_everywhere(cell: Cell, victim: int = 0, tool: str = STRACE, again: int = 1, step: int = 1) -> Report:
    """Kill one rank of a save at its first change of the disk, at its second, and so on.

    Args:
        cell: Where and what.
        victim: Which rank to kill.
        tool: What kills, STRACE or WATCH.
        again: In one of so many cases, save on top of what is left, and look for leftovers.
        step: Kill at one of so many changes.
    """
    who = "" if cell.ranks == 1 else f", rank {victim} killed"
    with Timed(Report(f"kill at every operation: {cell.name}{who}")) as report:
        for chunk in _chunks(cell.points(victim, tool)[::step], cell.chunk):
            shutil.rmtree(cell.folder / "killed", ignore_errors=True)
            roots = [cell.fresh(f"killed/{number}") for number in range(len(chunk))]
            killed = [_killed(cell, victim, tool, point, root) for point, root in zip(chunk, roots, strict=True)]
            returned = [any("returned" in outcome.told for outcome in outcomes) for outcomes in killed]
            verdicts = cell.judge(list(zip(roots, returned, strict=True)), again)
            for point, outcomes, (state, problems) in zip(chunk, killed, verdicts, strict=True):
                if any(outcome.hung for outcome in outcomes):
                    problems.append(f"a rank hung for {processes.GRACE_SECONDS} s")
                report.slowest = max(report.slowest, *(outcome.seconds_after_death for outcome in outcomes), 0.0)
                # A call that was not met, because calls of other threads came in another order, is no kill.
                report.add(str(point), state if outcomes[victim].killed else "not met", problems)
    return report


def _chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[first : first + size] for first in range(0, len(items), size))


def _killed(cell: Cell, victim: int, tool: str, point: Any, root: Path) -> list[Outcome]:
    if tool == STRACE:
        return cell.save(root, 1, attach=partial(tracing.kill_at, point, victim))
    args = cell.place(root), 1, cell.mode
    return processes.run(watching.killed, victim, point, root, program.save, *args, ranks=cell.ranks)


def lose_power(cell: Cell, limit: int, tool: str = STRACE, seed: int = 0) -> Report:
    """Load from every folder that a power cut during a save may leave, or from a sample of them."""
    with Timed(Report(f"power cut: {cell.name}")) as report:
        for chunk in _chunks(crashes(cell.start, cell.operations(tool), limit, seed), cell.chunk):
            folder = cell.folder / "power"
            shutil.rmtree(folder, ignore_errors=True)
            roots = [folder / str(number) for number in range(len(chunk))]
            for root, crash in zip(roots, chunk, strict=True):
                write_tree(root, crash.tree)
            for crash, root, values in zip(chunk, roots, cell.each(program.load, roots), strict=True):
                state, problems = cell.judge_loaded(root, values, crash.returned)
                report.add(f"after {crash.after} operations, {crash.why}", state, problems)
    return report


@dataclass
class _History:
    """What a loop of saves has announced and promised, kept outside of its processes."""

    ranks: int
    announced: dict[int, list[list[Digest]]] = field(default_factory=dict)
    committed: list[int] = field(default_factory=list)
    last: int = 0
    """The save that was begun last."""

    def note(self, outcomes: Sequence[Outcome]) -> None:
        for rank, outcome in enumerate(outcomes):
            for told in outcome.told:
                if "digest" in told:
                    self.last = max(self.last, told["saving"])
                    ranks = self.announced.setdefault(told["saving"], [[] for _ in range(self.ranks)])
                    ranks[rank].append(told["digest"])
                elif "saved" in told and told["saved"] not in self.committed:
                    self.committed.append(told["saved"])

    def number_of(self, values: Sequence[Any]) -> int | None:
        """Return the number of the save that every rank has loaded."""
        for number in sorted(self.announced, reverse=True):
            if all(value in known for value, known in zip(values, self.announced[number], strict=True)):
                return number
        return None


def kill_at_random(
    folder: Path, kind: str, total_limit: int, kills: int, *, ranks: int = 1, mode: str = "blocking", seed: int = 0
) -> Report:
    """Save in a loop, kill at a random moment, look, go on in the same folder; so many times."""
    limit = f", total_limit={total_limit}" if kind == NUMBERED else ""
    name = f"random kill: {kind}{limit}, {ranks} {'rank' if ranks == 1 else 'ranks'}, {mode}, seed {seed}"
    root = folder.resolve() / "random"
    place, generator, history = Place(root, kind, total_limit), random.Random(seed), _History(ranks)
    root.mkdir(parents=True)
    with Timed(Report(name)) as report:
        for number in range(kills + 1):  # the last one looks at what the last kill has left
            victims = generator.choice([[rank] for rank in range(ranks)] + [list(range(ranks))])
            kill = Kill(victims, generator.uniform(0, 0.15), lambda told: "saving" in told)
            outcomes = processes.run(program.train, place, mode, ranks=ranks, kill=kill)
            expected = len(history.committed)
            state, problems = _look(outcomes, history, 1 if kind != NUMBERED else total_limit)
            history.note(outcomes)
            report.slowest = max(report.slowest, *(outcome.seconds_after_death for outcome in outcomes), 0.0)
            if any(outcome.hung for outcome in outcomes):
                problems.append("a rank hung")
            if number:
                report.add(f"kill {number}", state, problems)
            if problems:
                shutil.rmtree(root)
                root.mkdir()
                history = _History(ranks)
            report.counts["committed"] += len(history.committed) - expected if not problems else 0
    return report


def _look(outcomes: Sequence[Outcome], history: _History, limit: int) -> tuple[str, list[str]]:
    """Compare what a restarted run has found with what was promised."""
    found = [_told(outcome, "found") for outcome in outcomes]
    if any(names is None for names in found):
        return "none", [f"it does not start: {_values(outcomes)}"]
    loaded = {name: [names.get(name) for names in found] for name in found[0]}
    loadable = [name for name, values in loaded.items() if history.number_of(values) is not None]
    problems = []
    if len(loadable) < min(limit, len(history.committed)):
        problems.append(f"{len(loadable)} checkpoints load, {len(history.committed)} were committed: {loaded}")
    if not loaded:
        return "none", problems
    number = history.number_of([_told(outcome, "continued") for outcome in outcomes])
    if number is None:
        return "none", [*problems, f"it does not continue: {_values(outcomes)}"]
    if history.committed and number < history.committed[-1]:
        problems.append(f"it continues from {number}, and {history.committed[-1]} was committed")
    return ("new" if number == history.last and number not in history.committed else "committed last"), problems


def _told(outcome: Outcome, kind: str) -> Any:
    return next((told[kind] for told in outcome.told if kind in told), None)
