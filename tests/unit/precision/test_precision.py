"""In which numbers a model computes."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import pytest
import torch

from accelerate.core.enums import PrecisionType
from accelerate.core.errors import UnsupportedCombination
from accelerate.hardware import CPU, Hardware
from accelerate.precision import BFloat16, Float16, FullPrecision, choose
from accelerate.precision.autocast import (
    ConvertOutputsToFp32,
    convert_outputs_to_fp32,
    to_float32,
    unwrap_forward,
    wrap_forward,
)
from accelerate.settings.options.handlers import AutocastKwargs, GradScalerKwargs

Pair = namedtuple("Pair", "a b")


class Model(torch.nn.Module):
    """Says in which numbers its layer computed."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)

    def forward(self, x, *, scale: float = 1.0):
        """Doc."""
        self.seen = self.layer(x).dtype
        return self.layer(x) * scale


def wrapped(**options):
    model = Model()
    BFloat16("cpu", AutocastKwargs(**options)).wrap(model)
    return model


X = torch.ones(1, 2)

# Choosing ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "autocast"), [("NO", FullPrecision, False), ("BF16", BFloat16, True), ("FP16", Float16, True)]
)
def test_each_precision_has_its_class(name, kind, autocast):
    found = choose(PrecisionType[name], CPU)
    assert type(found) is kind
    assert (found.name, found.uses_autocast) == (name.lower(), autocast)
    assert (found.scaler is not None) == (name == "FP16")


def test_options_of_the_scaler_arrive():
    found = choose(PrecisionType.FP16, CPU, scaler=GradScalerKwargs(init_scale=16.0, growth_interval=5))
    assert found.scaler.get_scale() == 16.0
    assert found.scaler.get_growth_interval() == 5
    assert not choose(PrecisionType.FP16, CPU, scaler=GradScalerKwargs(enabled=False)).scaler.is_enabled()


def test_a_device_without_bfloat16_is_refused():
    class Old(Hardware):
        def supports_bf16(self):
            return False

    with pytest.raises(UnsupportedCombination) as caught:
        choose(PrecisionType.BF16, Old("cuda", CPU.label), origin=" (from ACCELERATE_MIXED_PRECISION)")
    text = str(caught.value)
    assert "mixed_precision='bf16' (from ACCELERATE_MIXED_PRECISION) needs a device that computes in bfloat16" in text
    assert "this cuda device does not" in text
    assert "Accepted: 'no', 'fp16'." in text


def test_eight_bits_have_no_engine_yet():
    with pytest.raises(UnsupportedCombination, match="mixed_precision='fp8' needs an fp8 engine"):
        choose(PrecisionType.FP8, CPU)


# Regions ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        (FullPrecision(), torch.float32),
        (BFloat16("cpu"), torch.bfloat16),
        (choose(PrecisionType.FP16, CPU), torch.float16),
    ],
)
def test_a_region_computes_in_its_numbers(precision, dtype):
    with precision.autocast():
        assert torch.mm(X, X.T).dtype == dtype
    assert torch.mm(X, X.T).dtype == torch.float32


def test_a_region_may_be_switched_off_for_once_or_for_all():
    with BFloat16("cpu").autocast(AutocastKwargs(enabled=False)):
        assert torch.mm(X, X.T).dtype == torch.float32
    with BFloat16("cpu", AutocastKwargs(enabled=False)).autocast():
        assert torch.mm(X, X.T).dtype == torch.float32
    with BFloat16("cpu", AutocastKwargs(cache_enabled=False)).autocast():
        assert not torch.is_autocast_cache_enabled()


# A model's forward ------------------------------------------------------------------------------------------------------


def test_a_wrapped_model_computes_in_half_and_answers_in_single_precision():
    model = wrapped()
    assert model(X).dtype == torch.float32
    assert model.seen == torch.bfloat16
    assert model.layer.weight.dtype == torch.float32
    model(X).sum().backward()
    assert model.layer.weight.grad.dtype == torch.float32


def test_outputs_may_stay_in_half_precision():
    assert wrapped(outputs_to_fp32=False)(X).dtype == torch.bfloat16


def test_full_precision_leaves_the_model_alone():
    model = Model()
    FullPrecision().wrap(model)
    assert "forward" not in model.__dict__
    assert model(X).dtype == model.seen == torch.float32


def test_the_wrapped_forward_looks_like_the_models_own():
    model = wrapped()
    assert inspect.signature(model.forward) == inspect.signature(Model().forward)
    assert model.forward.__doc__ == "Doc."
    assert torch.equal(model(X, scale=0.0), torch.zeros(1, 2))


def test_wrapping_again_takes_the_place_of_the_first():
    model = wrapped()
    wrap_forward(model, BFloat16("cpu").autocast, outputs_to_fp32=False)
    assert model(X).dtype == torch.bfloat16
    FullPrecision().wrap(model)
    assert model(X).dtype == model.seen == torch.float32
    assert "forward" not in vars(model)


def test_a_forward_of_the_instance_keeps_its_signature():
    model = Model()
    model.forward = lambda x: x * 2
    wrap_forward(model, BFloat16("cpu").autocast, outputs_to_fp32=True)
    assert list(inspect.signature(model.forward).parameters) == ["x"]
    assert torch.equal(model(X), X * 2)


def test_unwrapping_leaves_no_trace():
    model = wrapped()
    before = set(Model().__dict__)
    unwrap_forward(model)
    assert set(model.__dict__) == before
    assert model(X).dtype == model.seen == torch.float32
    unwrap_forward(model)


def test_a_forward_of_the_instance_is_wrapped_and_given_back():
    model = Model()
    own = lambda x: model.layer(x)  # noqa: E731
    model.forward = own
    wrap_forward(model, BFloat16("cpu").autocast, outputs_to_fp32=False)
    assert model(X).dtype == torch.bfloat16
    unwrap_forward(model)
    assert model.forward is own


def test_a_copy_computes_with_its_own_parameters():
    model = wrapped()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(twin(X), torch.zeros(1, 2))
    assert twin.seen == torch.bfloat16
    assert not torch.equal(model(X), torch.zeros(1, 2))
    unwrap_forward(twin)
    assert "forward" not in twin.__dict__
    assert "_original_forward" in model.__dict__


def test_a_pickled_model_comes_back_with_its_class_forward():
    model = pickle.loads(pickle.dumps(wrapped()))
    assert model(X).shape == (1, 2)
    unwrap_forward(model)
    assert "forward" not in model.__dict__


def test_a_region_is_made_afresh_for_each_call():
    made = []

    def region():
        made.append(BFloat16("cpu").autocast())
        return made[-1]

    model = Model()
    wrap_forward(model, region, outputs_to_fp32=True)
    model(X)
    model(X)
    assert len(made) == 2


# Outputs ----------------------------------------------------------------------------------------------------------------


class Output(OrderedDict):
    """A mapping of a class of its own, as model outputs of Transformers are."""


def test_outputs_keep_their_containers():
    half = torch.ones(1, dtype=torch.bfloat16)
    data = (half, [half], {"a": half}, Pair(half, "x"), Output(a=half), torch.ones(1, dtype=torch.int64), None)
    found = to_float32(data)
    assert [type(item) for item in found] == [type(item) for item in data]
    assert [found[0].dtype, found[1][0].dtype, found[2]["a"].dtype, found[3].a.dtype, found[4]["a"].dtype] == [
        torch.float32
    ] * 5
    assert found[5] is data[5]
    assert half.dtype == torch.bfloat16


def test_a_dataclass_that_is_no_mapping_is_passed_through():
    @dataclass
    class Plain:
        loss: torch.Tensor

    output = Plain(torch.ones(1, dtype=torch.bfloat16))
    assert to_float32(output) is output


def test_a_function_can_be_decorated_to_answer_in_single_precision():
    def forward(x):
        """Doc."""
        return x.to(torch.float16)

    for converting in (convert_outputs_to_fp32(forward), ConvertOutputsToFp32(forward)):
        assert converting(X).dtype == torch.float32
        assert converting.__wrapped__ is forward
