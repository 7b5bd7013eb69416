"""Optimizer states are kept under the names of parameters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from accelerate.checkpoint import naming
from accelerate.core.errors import CheckpointError

from .support import Run, same_bits


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = torch.nn.Linear(2, 3)
        self.two = torch.nn.Linear(3, 3)


def trained(*groups: list[str], net: Net | None = None, **options: Any) -> tuple[Net, torch.optim.Optimizer]:
    """Return a net and its optimizer over these groups of parameters, with a state that differs for each of them."""
    net = net or Net()
    parameters = dict(net.named_parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [parameters[name] for name in group], "lr": 0.1 * number}
            for number, group in enumerate(groups, 1)
        ],
        **options,
    )
    for number, parameter in enumerate(net.parameters()):
        parameter.grad = torch.full_like(parameter, 1.0 + number)
    optimizer.step()
    return net, optimizer


def states(net: Net, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {name: optimizer.state[parameter] for name, parameter in net.named_parameters()}


def save(folder: Path, net: Net, optimizer: torch.optim.Optimizer) -> None:
    Run().having(models=[net], optimizers=[optimizer]).save(folder)


def load(folder: Path, net: Net, optimizer: torch.optim.Optimizer) -> None:
    Run().having(models=[net], optimizers=[optimizer]).load(folder)


ALL = ["one.weight", "one.bias", "two.weight", "two.bias"]


def test_the_file_says_which_parameter_a_state_belongs_to(tmp_path: Path) -> None:
    save(tmp_path, *trained(ALL))

    state = json.loads((tmp_path / "optimizer.json").read_text())["state"]

    assert list(state["state"]) == ALL
    assert state["param_groups"][0]["params"] == ALL


def test_parameters_given_in_another_order_find_their_states(tmp_path: Path) -> None:
    net, optimizer = trained(ALL)
    save(tmp_path, net, optimizer)

    other, later = trained(ALL[::-1])
    load(tmp_path, other, later)

    assert same_bits(states(other, later), states(net, optimizer))


def test_groups_in_another_order_keep_their_options(tmp_path: Path) -> None:
    net, optimizer = trained(ALL[:2], ALL[2:])
    save(tmp_path, net, optimizer)

    other, later = trained(ALL[2:], [*ALL[:2]])
    load(tmp_path, other, later)

    assert [group["lr"] for group in later.param_groups] == [0.2, 0.1]
    assert same_bits(states(other, later), states(net, optimizer))


def schedules(optimizer: Any) -> dict[str, Any]:
    return {"schedulers": [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)]}


def registered(optimizer: Any) -> dict[str, Any]:
    return {"custom_objects": [torch.optim.lr_scheduler.StepLR(optimizer, 5)]}


@pytest.mark.parametrize("more", [schedules, registered])
def test_groups_in_another_order_are_refused_where_a_schedule_knows_them_by_their_place(
    tmp_path: Path, more: Any
) -> None:
    net, optimizer = trained(ALL[:2], ALL[2:])
    Run().having(models=[net], optimizers=[optimizer], **more(optimizer)).save(tmp_path)

    other, later = trained(ALL[2:], ALL[:2])
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"in another order[^*]*one\.weight, two\.weight"):
        Run().having(models=[other], optimizers=[later], **more(later)).load(tmp_path)

    assert [group["lr"] for group in later.param_groups] == [0.1, 0.2]
    assert same_bits(dict(other.state_dict()), before)
    same, later = trained(ALL[:2], ALL[2:])
    Run().having(models=[same], optimizers=[later], **more(later)).load(tmp_path)


def test_names_that_pytorch_keeps_itself_stay_those_of_the_optimizer(tmp_path: Path) -> None:
    net = Net()
    optimizer = torch.optim.SGD(net.named_parameters(), momentum=0.9)
    save(tmp_path, net, optimizer)

    later = torch.optim.SGD(list(net.named_parameters())[::-1], momentum=0.9)
    load(tmp_path, net, later)

    assert later.param_groups[0]["param_names"] == ALL[::-1]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([ALL[:3]], r"saved and not in it: two\.bias"),
        ([ALL[:1], ALL[1:]], "Group 0 of the optimizer .* is none of the groups"),
    ],
)
def test_an_optimizer_over_other_parameters_is_refused(tmp_path: Path, groups: list[list[str]], message: str) -> None:
    save(tmp_path, *trained(ALL))

    with pytest.raises(CheckpointError, match=message):
        load(tmp_path, *trained(*groups))


def test_a_parameter_that_was_not_saved_is_named(tmp_path: Path) -> None:
    save(tmp_path, *trained(ALL[:3]))

    with pytest.raises(CheckpointError, match=r"in it and not saved: two\.bias"):
        load(tmp_path, *trained(ALL))


def test_parameters_of_no_known_model_are_numbered(tmp_path: Path) -> None:
    net, optimizer = trained(ALL)
    Run().having(optimizers=[optimizer]).save(tmp_path)

    other, later = trained(ALL)
    Run().having(optimizers=[later]).load(tmp_path)

    assert same_bits(states(other, later), states(net, optimizer))


def test_names_are_found_by_place_where_the_model_is_not_prepared(tmp_path: Path) -> None:
    net, optimizer = trained(ALL)
    save(tmp_path, net, optimizer)

    other, later = trained(ALL)
    Run().having(optimizers=[later]).load(tmp_path, strict=False, pre_hooks=[lambda *_: None])

    assert same_bits(states(other, later), states(net, optimizer))


def test_models_that_share_a_parameter_or_a_name() -> None:
    first, second = Net(), Net()
    second.one = first.one
    names = naming.parameter_names([first, second])

    assert names[id(second.one.weight)] == "one.weight"
    assert names[id(second.two.weight)] == "model_1..two.weight"


class Nested(torch.nn.Module):
    """Its parameter is called as that of a second model might be."""

    def __init__(self) -> None:
        super().__init__()
        self.model_1 = torch.nn.Linear(2, 3, bias=False)


def nested_and_plain() -> tuple[list[torch.nn.Module], torch.optim.Optimizer]:
    models = [Nested(), torch.nn.Linear(2, 3, bias=False)]
    parameters = [parameter for model in models for parameter in model.parameters()]
    for number, parameter in enumerate(parameters):
        parameter.grad = torch.full_like(parameter, 1.0 + number)
    return models, torch.optim.AdamW(parameters)


def test_a_module_that_is_called_like_a_second_model_keeps_its_state(tmp_path: Path) -> None:
    models, optimizer = nested_and_plain()
    optimizer.step()
    Run().having(models=models, optimizers=[optimizer]).save(tmp_path)

    others, later = nested_and_plain()
    Run().having(models=others, optimizers=[later]).load(tmp_path)

    assert same_bits(later.state_dict(), optimizer.state_dict())
    assert len(later.state) == 2


def test_two_parameters_of_one_name_are_refused() -> None:
    state = torch.optim.SGD([torch.zeros(1), torch.zeros(1)]).state_dict()

    with pytest.raises(CheckpointError, match="several parameters that are called 'weight'"):
        naming.to_names(state, [["weight", "weight"]])


def test_states_of_another_form_are_left_alone() -> None:
    for state in ({"ema": 1}, {"state": {}, "param_groups": "none"}, {"state": {}, "param_groups": [{"lr": 1}]}, 3):
        assert naming.to_names(state, [["a"]]) == state
        assert naming.to_numbers(state, [["a"]], "file") == state
    assert naming.keys_of(object(), {}) is None
