"""The model inside the wrappers, and compiling it."""

from __future__ import annotations

import pytest
import torch

from accelerate.core.enums import PrecisionType
from accelerate.hardware import CPU
from accelerate.parallel.compile import compile_model, repeated_blocks
from accelerate.parallel.unwrap import extract_model_from_parallel, has_compiled_regions, is_compiled_module
from accelerate.precision import choose
from accelerate.settings.options.compile import TorchDynamoPlugin
from tests.support.ranks import run_on_ranks

X = torch.ones(1, 2)


def linear():
    return torch.nn.Linear(2, 2)


class Blocks(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList([linear(), linear()])
        self.others = torch.nn.ModuleList([linear(), torch.nn.ReLU()])
        self.one = torch.nn.ModuleList([linear()])
        self.nested = torch.nn.Sequential(torch.nn.ModuleList([torch.nn.ReLU(), torch.nn.ReLU()]))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


# Compiling --------------------------------------------------------------------------------------------------------------


def test_nothing_is_compiled_unless_asked():
    model = linear()
    assert compile_model(model, TorchDynamoPlugin()) is model
    assert compile_model(model, TorchDynamoPlugin(backend="no")) is model


def test_a_model_is_compiled_once():
    model = linear()
    compiled = compile_model(model, TorchDynamoPlugin(backend="eager"))
    assert is_compiled_module(compiled)
    assert not is_compiled_module(model)
    assert torch.equal(compiled(X), model(X))
    assert compile_model(compiled, TorchDynamoPlugin(backend="eager")) is compiled


def test_repeated_blocks_are_those_of_uniform_lists():
    model = Blocks()
    assert list(repeated_blocks(model)) == [*model.blocks, *model.nested[0]]


def test_repeated_blocks_are_compiled_in_place():
    model = Blocks()
    options = TorchDynamoPlugin(backend="eager", use_regional_compilation=True)
    assert compile_model(model, options) is model
    assert has_compiled_regions(model)
    assert not is_compiled_module(model)
    assert model.blocks[0]._compiled_call_impl is not None
    assert model.others[0]._compiled_call_impl is None
    assert model(X).shape == (1, 2)


def test_a_model_without_repeated_blocks_is_compiled_whole():
    options = TorchDynamoPlugin(backend="eager", use_regional_compilation=True)
    assert is_compiled_module(compile_model(linear(), options))
    assert not has_compiled_regions(linear())


# Unwrapping -------------------------------------------------------------------------------------------------------------


def test_a_bare_model_comes_back_as_it_is():
    model = linear()
    assert extract_model_from_parallel(model) is model
    assert extract_model_from_parallel(model, False, False, recursive=True) is model


def test_a_compiled_model_stays_compiled_unless_told_otherwise():
    model = linear()
    compiled = torch.compile(model, backend="eager")
    assert extract_model_from_parallel(compiled) is compiled
    assert extract_model_from_parallel(compiled, keep_torch_compile=False) is model


@pytest.mark.parametrize("compiled", [False, True])
def test_the_precision_can_be_taken_off(compiled):
    model = linear()
    choose(PrecisionType.BF16, CPU).wrap(model)
    outer = torch.compile(model, backend="eager") if compiled else model
    assert "forward" in extract_model_from_parallel(outer, keep_torch_compile=False).__dict__
    assert (
        "forward" not in extract_model_from_parallel(outer, keep_fp32_wrapper=False, keep_torch_compile=False).__dict__
    )
    assert model(X).dtype == torch.float32


def test_torchs_old_data_parallel_is_a_wrapper_too():
    model = linear()
    assert extract_model_from_parallel(torch.nn.DataParallel(model)) is model


def of_data_parallel() -> dict:
    from torch.nn.parallel import DistributedDataParallel

    from accelerate import PartialState

    PartialState()
    model, inner = linear(), linear()
    wrapper = DistributedDataParallel(model)
    outside = torch.compile(wrapper, backend="eager")
    kept = extract_model_from_parallel(outside)
    inside = DistributedDataParallel(torch.compile(model, backend="eager"))
    holder = torch.nn.Sequential(DistributedDataParallel(inner))
    flat = extract_model_from_parallel(holder)[0]
    return {
        "plain": extract_model_from_parallel(wrapper) is model,
        "twice": extract_model_from_parallel(torch.nn.DataParallel(wrapper)) is model,
        "compiled outside, kept": (is_compiled_module(kept), kept._orig_mod is model),
        "the wrapped one is untouched": outside._orig_mod is wrapper,
        "compiled outside": extract_model_from_parallel(outside, keep_torch_compile=False) is model,
        "compiled inside": extract_model_from_parallel(inside, keep_torch_compile=False) is model,
        "inner wrappers stay": isinstance(flat, DistributedDataParallel),
        "inner wrappers go": extract_model_from_parallel(holder, recursive=True)[0] is inner,
    }


def test_models_inside_distributed_wrappers():
    (found,) = run_on_ranks(of_data_parallel, 1)
    assert found.pop("compiled outside, kept") == (True, True)
    assert found == dict.fromkeys(found, True)
