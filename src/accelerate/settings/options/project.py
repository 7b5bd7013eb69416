"""Where a run keeps its files."""

from __future__ import annotations

from dataclasses import dataclass

from ...core.errors import SettingError, explain


@dataclass
class ProjectConfiguration:
    """Folders of a run and the naming of its checkpoints."""

    project_dir: str | None = None
    """Folder for everything the run writes."""

    logging_dir: str | None = None
    """Folder for experiment logs. `None` means `project_dir`."""

    automatic_checkpoint_naming: bool = False
    """Let `save_state` name its folders `checkpoints/checkpoint_0`, `checkpoint_1`, ... under `project_dir`."""

    total_limit: int | None = None
    """How many of those to keep, at least 1; the oldest go once the newest is safely on disk. `None` keeps all."""

    iteration: int = 0
    """The number of the next checkpoint."""

    save_on_each_node: bool = False
    """Write files on every node, for nodes that do not share a file system."""

    save_on_signals: tuple[str, ...] | None = None
    """Signals on which the run saves itself and ends with status 75, such as `("SIGTERM", "SIGUSR1")`. Any process may get
    one; all stop at the next batch that all reach. Needs `automatic_checkpoint_naming` and `project_dir`. `None` means
    what ACCELERATE_SAVE_ON_SIGNALS says, which `accelerate launch --save_on_signals` sets."""

    def __post_init__(self) -> None:
        limit = self.total_limit
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
            raise SettingError(
                explain(
                    f"ProjectConfiguration(total_limit={limit!r}) is not a number of checkpoints to keep.",
                    accepted="an integer >= 1, or None",
                    remedy="Leave it out to keep all of them.",
                )
            )
        self.set_directories(self.project_dir)

    def set_directories(self, project_dir: str | None = None) -> None:
        """Set `project_dir`, and `logging_dir` too where it has none of its own."""
        self.project_dir = project_dir
        if self.logging_dir is None:
            self.logging_dir = project_dir
