from __future__ import annotations

import pytest

from accelerate.core.enums import (
    DDPCommunicationHookType,
    DistributedType,
    DynamoBackend,
    LoggerType,
    PrecisionType,
    RNGType,
)


def test_a_kind_of_distribution_equals_its_text_and_prints_as_a_member():
    assert DistributedType.MULTI_GPU == "MULTI_GPU"
    assert str(DistributedType.MULTI_GPU) == "DistributedType.MULTI_GPU"


def test_the_old_name_of_xla_is_the_same_member():
    assert DistributedType.TPU is DistributedType.XLA
    assert DistributedType("TPU") is DistributedType.XLA
    with pytest.raises(ValueError, match="MULTI_TPU"):
        DistributedType("MULTI_TPU")


def test_precisions_print_as_their_value_and_list_them():
    assert str(PrecisionType.BF16) == "bf16"
    assert PrecisionType.list() == ["no", "fp8", "fp16", "bf16"]
    assert LoggerType.list()[:2] == ["all", "aim"]


@pytest.mark.parametrize("kind", [PrecisionType, RNGType, LoggerType, DynamoBackend, DDPCommunicationHookType])
def test_membership_is_asked_by_value(kind):
    assert all(value in kind for value in kind.list())
    assert all(member in kind for member in kind)
    assert "zz" not in kind
    assert None not in kind


def test_an_unknown_value_is_refused():
    with pytest.raises(ValueError, match="zz"):
        PrecisionType("zz")
