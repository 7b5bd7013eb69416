"""Profile a region and write its trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..runtime.state import Runtime
from ..settings.options.handlers import ProfileKwargs


@contextmanager
def profile(runtime: Runtime, options: ProfileKwargs) -> Iterator[Any]:
    """Run the body under `torch.profiler`; each rank writes `profile_{rank}.json` if a folder is named."""
    with options.build() as profiler:
        yield profiler
    if options.output_trace_dir is not None:
        folder = Path(options.output_trace_dir)
        folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(folder / f"profile_{runtime.process.rank}.json"))
