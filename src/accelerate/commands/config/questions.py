"""The questions of `accelerate config`, and the configuration that follows from the answers.

Owns which questions are asked, in which order, and what may be answered on this machine. Knows no terminal: whoever
asks is a function from a `Question` to an answer. All answers are text, as a person would give them.

Engines that this version does not have are not offered, and a question with one possible answer is not asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ...core.available import is_installed
from ...core.enums import ComputeEnvironment, DistributedType
from ...core.text import is_host
from ...launch.devices import Devices
from ...settings.config_file import ClusterConfig

YES, NO = "yes", "no"
DEFAULT_PORT = "29500"
_HIGHEST_PORT = 65535


@dataclass(frozen=True)
class Choice:
    """One possible answer."""

    answer: str
    why: str
    """Half a sentence that explains it."""


@dataclass(frozen=True)
class Question:
    """One question, as it is put on this machine after the answers before it."""

    key: str
    text: str
    default: str
    choices: tuple[Choice, ...] = ()
    """What may be answered; empty for text."""
    problem: Callable[[str], str | None] = lambda _: None
    """Says what is wrong with an answer that is text."""

    @property
    def is_switch(self) -> bool:
        """Tell whether it is answered by yes or no."""
        return self.choices == _SWITCH

    def refusal(self, answer: str) -> str | None:
        """Say why an answer is not accepted; `None` if it is."""
        if not self.choices:
            return self.problem(answer)
        accepted = [choice.answer for choice in self.choices]
        return None if answer in accepted else f"{answer!r} is not one of {', '.join(accepted)}"


@dataclass(frozen=True)
class Surroundings:
    """What the questions depend on, apart from the answers."""

    devices: Devices
    label: DistributedType
    """How a run on several of the devices is called; of no meaning without any."""
    backends: tuple[str, ...] = ()
    """Back-ends of torch.compile that are installed besides torch's own."""

    @property
    def word(self) -> str:
        """What people call one of the devices."""
        return "GPU" if self.devices.name in ("cuda", "mps") else self.devices.name.upper()


Answers = Mapping[str, str]
_SWITCH = (Choice(YES, ""), Choice(NO, ""))


def installed_backends() -> tuple[str, ...]:
    """Return the back-ends of torch.compile that packages beside torch bring."""
    packages = {"tensorrt": "torch_tensorrt", "tvm": "tvm"}
    return tuple(backend for backend, module in packages.items() if is_installed(module))


def ask_all(ask: Callable[[Question], str], around: Surroundings) -> dict[str, str]:
    """Ask what has to be asked, and return the answers by the keys of the questions.

    Args:
        ask: Puts one question, and returns an answer that `Question.refusal` accepts.
        around: The machine.
    """
    answers: dict[str, str] = {}
    for section in (_where, _machines, _processes, _checks, _compilation, _numbers):
        for question in section(answers, around):
            answers[question.key] = ask(question).strip()
    return answers


def configuration(answers: Answers, around: Surroundings) -> ClusterConfig:
    """Return the configuration that a set of answers describes."""
    kind = DistributedType(answers["distributed_type"])
    machines = int(answers.get("num_machines", "1"))
    ids = answers.get("gpu_ids")
    on_devices = kind.value not in ("NO", "MULTI_CPU")
    here = len(_ids(ids)) if ids and ids != "all" else around.devices.count
    processes = answers.get("num_processes") or (here * machines if on_devices else 1)
    port = answers.get("main_process_port")
    return ClusterConfig(
        compute_environment=ComputeEnvironment.LOCAL_MACHINE,
        distributed_type=kind,
        mixed_precision=answers["mixed_precision"],
        use_cpu=_yes(answers, "use_cpu") or kind.value == "MULTI_CPU" or not around.devices.count,
        debug=_yes(answers, "debug"),
        num_processes=int(processes),
        machine_rank=int(answers.get("machine_rank", "0")),
        num_machines=machines,
        gpu_ids="all" if on_devices and ids is None and machines == 1 else ids,
        main_process_ip=answers.get("main_process_ip"),
        main_process_port=int(port) if port else None,
        rdzv_backend=answers.get("rdzv_backend", "static"),
        same_network=machines > 1,
        enable_cpu_affinity=_yes(answers, "enable_cpu_affinity"),
        dynamo_config=_dynamo(answers),
    )


def _dynamo(answers: Answers) -> dict[str, Any]:
    if not _yes(answers, "compile"):
        return {}
    found: dict[str, Any] = {
        "dynamo_backend": answers["dynamo_backend"].upper(),
        "dynamo_mode": answers["dynamo_mode"],
        "dynamo_use_fullgraph": _yes(answers, "dynamo_use_fullgraph"),
        "dynamo_use_regional_compilation": _yes(answers, "dynamo_use_regional_compilation"),
    }
    if answers["dynamo_use_dynamic"] != "auto":  # left out, torch finds out by itself
        found["dynamo_use_dynamic"] = _yes(answers, "dynamo_use_dynamic")
    return found


# --- the questions, in the order in which they are asked ------------------------------------------------------------
# Each section sees the answers of those before it, and its own: a generator goes on when its question is answered.


def _where(answers: Answers, around: Surroundings) -> Iterator[Question]:
    count, word = around.devices.count, around.word
    alone = f"on the {word}" if count else "on the CPU"
    choices = [
        Choice(DistributedType.NO.value, f"one process, {alone}; the script runs as under `python script.py`"),
        Choice(DistributedType.MULTI_CPU.value, "several processes on the CPU, which talk through gloo"),
    ]
    if count:
        seen = f"{count} {'is' if count == 1 else 'are'} visible here"
        choices.append(Choice(around.label.value, f"one process for each {word}; {seen}"))
    default = around.label if count > 1 else DistributedType.NO
    yield Question("distributed_type", "How shall scripts run?", default.value, tuple(choices))
    if answers["distributed_type"] == "NO" and count:
        yield _switch("use_cpu", f"Stay on the CPU, although there is a {word}?")


def _machines(answers: Answers, around: Surroundings) -> Iterator[Question]:
    if answers["distributed_type"] == "NO":
        return
    yield Question("num_machines", "How many machines take part?", "1", problem=_number(1))
    count = int(answers["num_machines"])
    if count == 1:
        return
    yield Question(
        "machine_rank",
        "Which of them is this one? The others connect to machine 0.",
        "0",
        problem=_number(0, count - 1),
    )
    yield Question(
        "main_process_ip",
        "What is the address of machine 0, as the others reach it?",
        "",
        problem=_address,
    )
    yield Question(
        "main_process_port", "On which port does machine 0 listen?", DEFAULT_PORT, problem=_number(1, _HIGHEST_PORT)
    )
    choices = (
        Choice("static", "fixed ranks; all machines are there from the beginning"),
        Choice("c10d", "torch's elastic meeting; a machine that was lost can come back"),
    )
    yield Question("rdzv_backend", "How do the machines find each other?", "static", choices)


def _processes(answers: Answers, around: Surroundings) -> Iterator[Question]:
    kind, machines = answers["distributed_type"], int(answers.get("num_machines", "1"))
    count, word = around.devices.count, around.word
    if kind == "NO":
        return
    many = _number(machines, multiple_of=machines)
    if kind == "MULTI_CPU":
        yield Question("num_processes", _total("How many processes", machines), str(2 * machines), problem=many)
    elif machines > 1:
        yield Question(
            "num_processes",
            _total(f"How many {word}s, one process each", machines),
            str(count * machines),
            problem=many,
        )
    elif count > 1:
        listed = ",".join(str(index) for index in range(count))
        text = f"Which of the {word}s? `all`, or numbers such as {listed}"
        yield Question("gpu_ids", text, "all", problem=_device_ids(count))
    if around.devices.name == "cuda" and kind == around.label.value and count > 1:
        yield _switch("enable_cpu_affinity", "Bind every process to the cores near its GPU?")


def _total(text: str, machines: int) -> str:
    return f"{text}?" if machines == 1 else f"{text}, on all {machines} machines together?"


def _checks(answers: Answers, around: Surroundings) -> Iterator[Question]:
    if answers["distributed_type"] != "NO":
        yield _switch(
            "debug",
            "Compare the tensors of all processes before they talk? It names what would otherwise hang, and costs time.",
        )


def _compilation(answers: Answers, around: Surroundings) -> Iterator[Question]:
    yield _switch("compile", "Compile models with torch.compile? The first steps take longer, the others less.")
    if answers["compile"] == NO:
        return
    choices = [
        Choice("inductor", "torch's own compiler"),
        Choice("eager", "captures graphs and runs them as they are, to look for faults"),
        Choice("aot_eager", "the same for the backward pass"),
    ]
    if around.devices.name == "cuda" and around.devices.count:
        choices.append(Choice("cudagraphs", "records CUDA graphs, and generates no code"))
    choices += [Choice(name, "an installed package beside torch") for name in around.backends]
    yield Question("dynamo_backend", "By which back-end?", "inductor", tuple(choices))
    modes = (
        Choice("default", "compiles fast and runs fast"),
        Choice("reduce-overhead", "less time between kernels, for more memory"),
        Choice("max-autotune", "tries out kernels; compiles for long"),
    )
    yield Question("dynamo_mode", "In which mode?", "default", modes)
    yield _switch("dynamo_use_fullgraph", "Refuse graph breaks? What cannot be compiled as a whole is then an error.")
    dynamic = (
        Choice("auto", "torch finds out which shapes change"),
        Choice(YES, "compile for changing shapes at once"),
        Choice(NO, "compile anew for each shape"),
    )
    yield Question("dynamo_use_dynamic", "Do shapes change from batch to batch?", "auto", dynamic)
    yield _switch("dynamo_use_regional_compilation", "Compile repeated blocks once? Large models start sooner.")


def _numbers(answers: Answers, around: Surroundings) -> Iterator[Question]:
    choices = (
        Choice("no", "plain float32"),
        Choice("fp16", "half the memory; gradients are scaled, for they overflow"),
        Choice("bf16", "half the memory, range of float32, fewer digits"),
    )
    yield Question("mixed_precision", "In which numbers shall models compute?", "no", choices)


def _switch(key: str, text: str) -> Question:
    return Question(key, text, NO, _SWITCH)


def replace_file(path: object) -> Question:
    """Return the last question, where there is a file already."""
    return Question("replace", f"{path} is there already. Replace it?", YES, _SWITCH)


# --- reading answers ------------------------------------------------------------------------------------------------


def _yes(answers: Answers, key: str) -> bool:
    return answers.get(key) == YES


def _ids(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


def _number(least: int, most: int | None = None, *, multiple_of: int = 1) -> Callable[[str], str | None]:
    def problem(text: str) -> str | None:
        text = text.strip()
        upper = "" if most is None else f" to {most}"
        wanted = f"a number from {least}{upper}" + ("" if multiple_of == 1 else f", a multiple of {multiple_of}")
        if not text.isascii() or not text.isdigit() or len(text) > len("1000000"):
            return f"{text!r} is not {wanted}"
        number = int(text)
        fits = number >= least and (most is None or number <= most) and number % multiple_of == 0
        return None if fits else f"{number} is not {wanted}"

    return problem


def _address(text: str) -> str | None:
    text = text.strip()
    if not text:
        return "an address or a host name is needed, such as 10.0.0.1"
    return None if is_host(text) else f"{text!r} is not an address or a host name"


def _device_ids(count: int) -> Callable[[str], str | None]:
    def problem(text: str) -> str | None:
        if text.strip() == "all":
            return None
        known = [str(index) for index in range(count)]
        wrong = [part for part in _ids(text) if part not in known]
        if wrong:
            return f"{wrong[0]!r} is not `all`, or one of {', '.join(known)}"
        return "a device stands there twice" if len(set(_ids(text))) < len(_ids(text)) else None

    return problem
