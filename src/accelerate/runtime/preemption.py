"""Stop at a place where everything can be saved, when a signal asks for it.

Owns the signal handlers, and the count of places that this process has come to. Where such places are is known to the
loops (`data.borders`), what is done there to the session (`session.preempt`), how ranks agree on one to
`collectives.crossing`.

[Note: what a place costs] As long as no signal has come, a place is a count and a comparison. The handler sets a flag and
nothing else, since it may interrupt anything; the thread that speaks for this process sets the same flag. Either looks at
the count only after it has set the flag, and the main thread at the flag only after it has counted: so a place that the
thread has not seen is one at which the main thread sees the flag.
"""

from __future__ import annotations

import atexit
import itertools
import os
import signal
import threading
import warnings
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

from ..collectives.crossing import Crossing, Outcome, Place, Report, StoreGone
from ..core.errors import SettingError, explain
from ..core.leaving import Preempted
from ..topology import connect
from .state import Runtime

current: Watch | None = None
"""The watch of this process, if the run saves itself on signals."""

_numbers = itertools.count()


class Watch:
    """Waits for signals, and stops the run at the first place that all ranks reach.

    Args:
        signals: The names of the signals.
        runtime: Ranks.
        leave: Called on all ranks at the same place with the reason; saves, and does not return.
        trains: Tells whether the run has anything to train.
    """

    def __init__(
        self, signals: Sequence[str], runtime: Runtime, leave: Callable[[str], None], trains: Callable[[], bool]
    ) -> None:
        self._leave, self.trains = leave, trains
        self._rank = runtime.process.rank
        self._pid = os.getpid()
        self._place: Place = (0, 0)
        """How many ends of loops were passed, doubled, and one more in a last batch; and how many places since."""
        self.work = 0
        """How often gradients were computed, or an optimizer stepped."""
        self._alarm = False
        self._received: int | None = None
        self._called = self._leaving = False
        self._spoken: Place | None = None
        self._main_speaks = False
        self.is_closed = False
        self._lock = threading.Lock()
        self._before: dict[int, Any] = {}
        self._crossing: Crossing | None = None
        self._thread: threading.Thread | None = None
        self._install(signals)
        if runtime.process.world_size > 1:
            name = f"accelerate/preemption/{next(_numbers)}"
            self._crossing = Crossing(connect.meeting_store(), name, self._rank, runtime.process.world_size)
            self._thread = threading.Thread(target=self._speak, name="accelerate-preemption", daemon=True)
            self._thread.start()

    # Places ------------------------------------------------------------------------------------------------------

    def reach(self) -> None:
        """Count a place at which everything can be saved; called on all ranks. Stops here if a signal asks for it.

        Costs nothing as long as none does. Then it is collective, and may wait for other ranks.

        Raises:
            Preempted: (a `SystemExit`) on all ranks, when everything is saved. Signals are ignored from then on.
            CheckpointError: On all ranks, if that failed. Signals have their usual effect from then on.
        """
        stretch, step = self._place
        self._place = (stretch, step + 1)
        if self._alarm and not self.is_closed:  # after the count: see [Note: what a place costs]
            self._stop()

    def near_end(self) -> None:
        """Note that a loop gives its last batch, which ranks may come to after different numbers of places."""
        self._skip_to(self._place[0] | 1)

    def end(self) -> None:
        """Note that a loop has ended."""
        self._skip_to((self._place[0] | 1) + 1)

    def _skip_to(self, stretch: int) -> None:
        self._place = (stretch, 0)
        if self._alarm and self._crossing is not None and not self._leaving and not self.is_closed:
            following = (stretch, 1)
            if self._may_speak(following):
                self._crossing.move(following)

    def _stop(self) -> None:
        if self._leaving:  # what is called while saving may come to places too
            return
        if self._crossing is None:
            assert self._received is not None  # nobody else sets the alarm
            reason = self._reason(self._received)
        else:
            try:
                reason = self._meet(self._crossing)
            except StoreGone as error:
                self._lose(error)
                return
        if reason is None:
            return
        self._leaving = True
        try:
            self._leave(reason)
        except Preempted:
            raise
        except BaseException:
            # Ranks have met, which they do once. Better that signals end the run than that nobody hears them.
            stop()
            raise

    def _meet(self, crossing: Crossing) -> str | None:
        """Stand at the place where this rank is; return why, if all ranks do."""
        may_stand = self._may_speak(self._place)  # before the call, which wakes this rank's thread too
        if self._received is not None and not self._called:
            self._called = True
            crossing.call(self._reason(self._received))
        if not may_stand:
            return None
        outcome = crossing.stand(self._place, connect.group_timeout().total_seconds())
        if outcome is Outcome.GIVEN_UP:
            self._give_up(crossing)
        return crossing.reason if outcome is Outcome.MET else None

    def _may_speak(self, place: Place) -> bool:
        """Take over from the thread; return whether it has not promised a later place than `place`."""
        with self._lock:
            self._main_speaks = True
        return self._spoken is None or place >= self._spoken

    def _speak(self) -> None:
        """Run in the thread: wait for a call, and say where this rank comes next."""
        assert self._crossing is not None  # started only with one
        if not self._crossing.listen():
            return
        self._alarm = True
        with self._lock:
            if self._main_speaks:
                return
            stretch, step = self._place
            self._spoken = (stretch, step + 1)
            self._crossing.speak_for(self._spoken)

    def _give_up(self, crossing: Crossing) -> None:
        told = "; ".join(f"rank {rank} {_described(report)}" for rank, report in enumerate(crossing.reports()))
        warnings.warn(
            explain(
                f"{crossing.reason}, and the ranks did not come to the same place to save the run ({crossing.who_gave_up()}). "
                f"{told}. It goes on, and further signals have their usual effect.",
                remedy="Let all ranks run the same loops over prepared loaders, and call check_preemption() on all of them.",
            ),
            RuntimeWarning,
            stacklevel=5,
        )
        stop()

    def _lose(self, error: Exception) -> None:
        warnings.warn(
            f"Rank {self._rank} cannot ask the others to save the run, or answer them: the store in which they found each "
            f"other does not answer ({error}). It goes on, and further signals have their usual effect.",
            RuntimeWarning,
            stacklevel=5,
        )
        stop()

    # Signals -----------------------------------------------------------------------------------------------------

    def _install(self, signals: Sequence[str]) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise SettingError(
                explain(
                    f"save_on_signals={tuple(signals)!r} was given in the thread {threading.current_thread().name!r}, and "
                    "Python takes signal handlers in the main thread only.",
                    remedy="Create the Accelerator in the main thread, or leave save_on_signals out.",
                )
            )
        numbers = [signal.Signals[name] for name in signals]
        if foreign := [number.name for number in numbers if signal.getsignal(number) is None]:
            raise SettingError(
                explain(
                    f"save_on_signals names {foreign[0]}, for which code outside of Python has set a handler that could "
                    "neither be called nor put back.",
                    remedy="Leave that signal out of save_on_signals, or remove the handler.",
                )
            )
        for number in numbers:
            self._before[number] = signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal: set the flag, then call the handler that was there before, if there was one."""
        before = self._before.get(number)
        if os.getpid() != self._pid:  # a forked copy of this process, which saves nothing
            _as_before(number, before, frame)
            return
        if self._leaving:
            # Not by print: the signal may have interrupted one.
            os.write(2, f"accelerate: {_name(number)} again: rank {self._rank} is saving already.\n".encode())
            return
        if self._received is None:
            self._received = number
        self._alarm = True
        if callable(before):
            before(number, frame)

    def _reason(self, number: int) -> str:
        return f"rank {self._rank} received {_name(number)}"

    def close(self) -> None:
        """Put the handlers back that were there before, and end the thread."""
        self.is_closed = True
        for number, handler in self._before.items():
            if threading.current_thread() is threading.main_thread() and signal.getsignal(number) == self._receive:
                signal.signal(number, handler)
        if self._crossing is not None and self._thread is not None:
            self._crossing.close()
            self._thread.join(5)


def start(signals: Sequence[str], runtime: Runtime, leave: Callable[[str], None], trains: Callable[[], bool]) -> None:
    """Watch for signals from now on, until `stop`; see `Watch`. Called on all ranks.

    Raises:
        SettingError: (a `ValueError`) if a watch runs already, or a handler cannot be set.
    """
    global current
    if current is not None:
        raise SettingError(
            explain(
                f"save_on_signals={tuple(signals)!r} was given to a second Accelerator, while the first one saves what it "
                "has prepared on signals.",
                accepted="one Accelerator with save_on_signals",
                remedy="Prepare everything with one, or call end_training() on the first one before.",
            )
        )
    current = Watch(signals, runtime, leave, trains)
    atexit.register(stop)


def stop() -> None:
    """Let signals have their usual effect again. Does nothing if there is no watch, or in a forked copy of its process."""
    global current
    watch, current = current, None
    atexit.unregister(stop)
    if watch is not None and watch._pid == os.getpid():
        watch.close()


def note_work() -> None:
    """Note that gradients were computed, or an optimizer stepped: the loop that does so trains."""
    if current is not None:
        current.work += 1


def _as_before(number: int, before: Any, frame: FrameType | None) -> None:
    if callable(before):
        before(number, frame)
    elif before == signal.SIG_DFL:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def _name(number: int) -> str:
    return signal.Signals(number).name


def _described(report: Report | None) -> str:
    if report is None:
        return "has not answered"
    if report.place is None:
        return "has ended"
    stretch, step = report.place
    where = (
        f"place {step} {'behind the last batch' if stretch % 2 else 'between the batches'} of loop {stretch // 2 + 1}"
    )
    return f"waits at {where}" if report.stands else f"comes to {where} next"
