"""A person's first session, in tmux: `accelerate config` with arrows and defaults, then `accelerate launch`.

    python -m tests.examples.session

Types into a real terminal, waits for what appears there, and writes docs/tutorials/config.md with the screens. Whatever
does not appear within two minutes is an error. Names of temporary folders are replaced by `~`, and several empty lines by one; nothing else is edited.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "tutorials" / "config.md"
WAIT_SECONDS = 120
PROMPT = "you@here$ "

INTRODUCTION = """# A first session: questions, a file, a run

<!-- Made by `make session`, which types this into a real terminal. Do not edit it here. -->

`accelerate launch` needs no configuration: it uses the devices it finds, and every setting is a flag. A file saves typing
where the same flags come back. `accelerate config` asks for what it should say.

This is such a session as it was on the screen, on a machine without a GPU, where two processes share the CPU. What is
answered by pressing Enter is the default. On a machine with GPUs there is one more answer to the first question, one
process for each GPU, and with several of them it is the default.
"""

CONCLUSION = """
Where the file lies, what else writes one, and what the questions leave out: [Commands](../reference/commands.md).
Which setting wins over which: [Settings that explain themselves](../explain/settings.md).
"""


class Terminal:
    """A window of tmux, with a server of its own."""

    def __init__(self, home: Path) -> None:
        self.socket = str(home / "tmux")
        keep = {name: os.environ[name] for name in ("PYTHONPATH", "LANG", "LC_ALL") if name in os.environ}
        variables = {
            **keep,
            "HOME": str(home),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PS1": PROMPT,
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "HISTFILE": "",  # or it would write to a folder that is being removed
        }
        words = [f"{name}={value}" for name, value in variables.items()]
        shell = ["env", "-i", "TERM=screen-256color", *words, "bash", "--norc", "--noprofile"]
        self.tmux("-f", "/dev/null", "-u", "new-session", "-d", "-x", "118", "-y", "40", "-c", str(ROOT), *shell)
        self.home = home

    def tmux(self, *words: str) -> str:
        done = subprocess.run(["tmux", "-S", self.socket, *words], check=True, capture_output=True, text=True)
        return done.stdout

    def screen(self) -> str:
        """Return what is on the screen, without empty lines at the end."""
        lines = [line.rstrip() for line in self.tmux("capture-pane", "-p").splitlines()]
        text = "\n".join(lines).strip("\n").replace(str(self.home), "~")
        return re.sub(r"\n{3,}", "\n\n", text)  # a message on the last line of the screen

    def wait_for(self, text: str) -> None:
        """Wait until the screen ends with `text`, or a line of it begins so."""
        end = time.monotonic() + WAIT_SECONDS
        while not any(line.startswith(text) for line in self.screen().splitlines()):
            if time.monotonic() > end:
                raise SystemExit(f"{text!r} did not appear:\n{self.screen()}")
            time.sleep(0.05)

    def press(self, *keys: str) -> None:
        for key in keys:
            self.tmux("send-keys", key)

    def type(self, line: str) -> None:
        """Type a command on a clean screen, and press Enter."""
        self.tmux("send-keys", "clear", "Enter")
        while self.screen() != PROMPT.strip():
            time.sleep(0.05)
        self.tmux("send-keys", "-l", line)
        self.tmux("send-keys", "Enter")


def block(text: str) -> str:
    return f"\n```\n{text}\n```\n"


def session(terminal: Terminal) -> str:
    """Play the session, and return the page."""
    page = [INTRODUCTION]
    done = f"{PROMPT.strip()}"
    terminal.wait_for(done)

    terminal.type("accelerate config")
    terminal.wait_for("? How shall scripts run? (Use arrow keys)")
    page += ["\nThe first question, as it appears:\n", block(terminal.screen())]
    terminal.press("Down", "Enter")
    terminal.wait_for("? How many machines take part?")
    terminal.press("Enter")
    terminal.wait_for("? How many processes?")
    terminal.press("x")
    terminal.press("Enter")
    terminal.wait_for("'x' is not a number from 1")
    page += ["\nArrow down, Enter, Enter, and a letter where a number is wanted:\n", block(terminal.screen())]
    terminal.press("BSpace", "Enter")
    for question in ("? Compare the tensors", "? Compile models with torch.compile?"):
        terminal.wait_for(question)
        terminal.press("Enter")
    terminal.wait_for("? In which numbers shall models compute?")
    page += ["\nThe letter is removed, and Enter takes the default, here and twice more:\n", block(terminal.screen())]
    terminal.press("Enter")
    terminal.wait_for("Run a script with it:")
    terminal.wait_for(done)
    page += ["\nThe last Enter, and the file is written. Control-C at any time before leaves none:\n"]
    page += [block(terminal.screen())]

    terminal.type("cat ~/.cache/huggingface/accelerate/default_config.yaml")
    terminal.wait_for("use_cpu: true")
    page += ["\nThis is what it says:\n", block(terminal.screen().removesuffix(done).rstrip())]

    terminal.type("accelerate launch examples/digits/train.py --folder ~/digits; echo status $?")
    terminal.wait_for("status ")
    shown = terminal.screen()
    if "status 0" not in shown:
        raise SystemExit(f"the run failed:\n{shown}")
    page += ["\nAnd with it, two processes learn handwritten digits; no flag says so:\n"]
    page += [block(shown.removesuffix(done).rstrip())]
    return "".join([*page, CONCLUSION])


def play() -> str:
    """Play the session in a home of its own, and return the page."""
    with tempfile.TemporaryDirectory(prefix="person-") as folder:
        terminal = Terminal(Path(folder))
        try:
            return session(terminal)
        finally:
            terminal.tmux("kill-server")


def main() -> None:
    page = play()
    PAGE.write_text(page, encoding="utf-8")
    print(f"{PAGE.relative_to(ROOT)} is written.")


if __name__ == "__main__":
    main()
