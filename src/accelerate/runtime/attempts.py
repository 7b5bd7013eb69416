"""Attempts at something that may run out of memory, on all ranks together.

Owns what happens between two attempts: ranks that wait for one that failed come out, all hear how it went, what the
attempt held is released, and the process group is whole again. Which size comes next is decided elsewhere.

[Note: one rank runs out] The rank that ran out raises a flag in the store and breaks off its groups (see the note
"breaking off" in `topology.connect`). The others fail in the collective they are in, or in the next one. A rank that
fails for another reason than memory looks for the flag: it was raised before any connection closed, so if there is
none, the error is the rank's own and goes to the caller. In the end all ranks vote, whether they finished or not, and
if one of them did not, they make the group anew and try again.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..collectives.ballot import Ballot, StoreBallot
from ..core.errors import explain
from ..topology import connect
from . import state
from .accumulation import GradientState

FITS, RAN_OUT, RELEASED = "fits", "ran out", "released"

UNBREAKABLE_PATIENCE_SECONDS = 60.0
"""How long a rank that ran out waits for the others where they cannot be released from a collective."""


@dataclass(frozen=True)
class Verdict:
    """How an attempt went on all ranks."""

    ran_out: tuple[int, ...]
    """The ranks that ran out of memory."""

    why: str
    """What the first of them said."""

    result: Any = None
    """What the attempt returned on this rank, if it fits."""

    @property
    def fits(self) -> bool:
        """Whether all ranks finished."""
        return not self.ran_out


class Attempts:
    """The attempts of one call, numbered alike on all ranks.

    Args:
        agree: Whether the ranks decide together.
        release: Called between attempts, to give memory back.
    """

    def __init__(self, agree: bool, release: Callable[[], Any]) -> None:
        self._runtime = state.current_or_single()
        self.together = agree and self._runtime.process.world_size > 1
        """Whether the ranks decide together."""
        self._release = release
        self._questions = 0
        if self.together:
            self._store = connect.meeting_store()
            call = self._store.add(f"accelerate/attempts/calls/{self._runtime.process.rank}", 1)
            self._name = f"accelerate/attempts/{call}"

    def smallest(self, propose: Callable[[], int]) -> int:
        """Return the smallest of what `propose` gives on the ranks. Called on all ranks; collective, over the store.

        Raises:
            RuntimeError: If another rank failed, or did not come.
        """
        if not self.together:
            return propose()
        ballot = self._ballot()
        try:
            own = int(propose())
        except BaseException as error:
            ballot.give_up(_first_line(error))
            raise
        return min(map(int, self._vote(ballot, str(own))))

    def run(self, trial: Callable[[], Any], *, keep: bool = True) -> Verdict:
        """Try, and hear how it went on all ranks. Called on all ranks; collective. See [Note: one rank runs out].

        Args:
            trial: What to try. Any error that is not about memory goes to the caller.
            keep: Whether a trial that fits shall leave its traces: what it returned, and what it drew at random.

        Raises:
            RuntimeError: If another rank failed, or the process group cannot be used any more.
        """
        before, ballot = _Traces(), self._ballot()
        outcome, why, result = self._try(trial, ballot)
        if outcome != FITS and self._breakable():
            connect.break_off()
        votes = self._count(ballot, outcome, why)
        ran_out = tuple(rank for rank, vote in enumerate(votes) if vote["outcome"] == RAN_OUT)
        if keep and not ran_out:
            return Verdict((), "", result)
        del result
        self._release()
        before.restore()
        if ran_out:
            self._meet_again(votes)
        return Verdict(ran_out, votes[ran_out[0]]["why"] if ran_out else "")

    def _try(self, trial: Callable[[], Any], ballot: Ballot) -> tuple[str, str, Any]:
        try:
            return FITS, "", trial()
        except Exception as error:
            if self._runtime.hardware.is_out_of_memory(error):
                ballot.flag()
                return RAN_OUT, _first_line(error), None
            if self._breakable() and ballot.flagged:
                return RELEASED, _first_line(error), None
            ballot.give_up(_first_line(error))
            raise
        except BaseException as error:  # an interrupt: the others need not wait for this rank
            ballot.give_up(_first_line(error))
            raise

    def _count(self, ballot: Ballot, outcome: str, why: str) -> list[dict[str, Any]]:
        vote = {"outcome": outcome, "why": why, "begun": connect.collectives_begun() if self.together else []}
        if outcome != RAN_OUT or not self.together or self._breakable():
            return [json.loads(text) for text in self._vote(ballot, json.dumps(vote))]
        try:
            votes = ballot.vote(json.dumps(vote), UNBREAKABLE_PATIENCE_SECONDS)
        except TimeoutError as error:
            raise _cut_off(f"{why}; {error}") from None
        return [json.loads(text) for text in votes]

    def _vote(self, ballot: Ballot, text: str) -> list[str]:
        try:
            return ballot.vote(text, connect.group_timeout().total_seconds() if self.together else 0.0)
        except TimeoutError as error:
            raise RuntimeError(
                explain(
                    f"The processes cannot agree: {error}, which is the timeout of the process group.",
                    remedy="Call the function on all processes, or let each decide by itself with agree=False.",
                )
            ) from None

    def _meet_again(self, votes: list[dict[str, Any]]) -> None:
        if not self.together:
            return
        if self._breakable():
            self._questions += 1
            connect.join_again(self._store, f"{self._name}/group/{self._questions}")
        elif votes[0]["begun"] is None or any(vote["begun"] != votes[0]["begun"] for vote in votes):
            raise _cut_off(next(vote["why"] for vote in votes if vote["outcome"] == RAN_OUT))

    def _ballot(self) -> Ballot:
        if not self.together:
            return Ballot()
        self._questions += 1
        process = self._runtime.process
        return StoreBallot(self._store, f"{self._name}/{self._questions}", process.rank, process.world_size)

    def _breakable(self) -> bool:
        return self.together and connect.can_break_off()


class _Traces:
    """The random states, and those of accumulation, as they were."""

    def __init__(self) -> None:
        self._hardware = state.current_or_single().hardware
        self._drawn = random.getstate(), np.random.get_state(), torch.get_rng_state()
        self._drawn_on_device = self._hardware.get_rng_state() if self._hardware.is_initialized() else None
        self._accumulation = _accumulation() if GradientState._shared_state else None

    def restore(self) -> None:
        """Put them back."""
        random.setstate(self._drawn[0])
        np.random.set_state(self._drawn[1])
        torch.set_rng_state(self._drawn[2])
        if self._drawn_on_device is not None:
            self._hardware.set_rng_state(self._drawn_on_device)
        if self._accumulation is not None:
            shared = GradientState()
            shared.dataloader_references, shared.sync_gradients = self._accumulation


def _accumulation() -> tuple[list[Any], bool]:
    shared = GradientState()
    return shared.dataloader_references, shared.sync_gradients


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]:.200}" if text else type(error).__name__


def _cut_off(problem: str) -> RuntimeError:
    return RuntimeError(
        explain(
            f"A process ran out of memory while others had not, or had begun other collectives: {problem}.",
            accepted="gloo groups, which are broken off and made anew; with other backends, all processes running out "
            "at the same place",
            remedy="Start again with a smaller starting_batch_size.",
        )
    )
