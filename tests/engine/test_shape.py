"""Sizes from metadata: what is read, what has a default, what is refused."""

import math
from typing import Any

import numpy as np
import pytest
from builders import SMALL_DENSE, SMALL_MOE, Form, model_metadata, resized
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.make_model import architecture_metadata
from benchmarks.model_sizes import SIZES
from daemon.engine.model.shape import read_shape
from daemon.errors import ModelError, ModelFileError, UnsupportedModel

OPTIONAL = {
    "qwen35.rope.dimension_count",
    "qwen35.rope.dimension_sections",
    "qwen35.rope.freq_base",
    "qwen35.attention.value_length",
    "qwen35.full_attention_interval",
    "general.name",
}
DENSE_KEYS = sorted(set(model_metadata(SMALL_DENSE)) - {"general.architecture"})
EXPERT_KEYS = sorted(key for key in model_metadata(SMALL_MOE) if ".expert_" in key)
MISTAKES = ["four", [], [1, 2], math.nan, math.inf, -math.inf, -1, 0, True, 2.5, {}]


def changed(key: str, value: Any, form: Form = Form()) -> dict[str, Any]:  # noqa: B008
    return model_metadata(SMALL_DENSE, form) | {key: value}


@pytest.mark.parametrize("name", SIZES)
def test_every_published_size(name: str) -> None:
    sizes = SIZES[name]
    shape = read_shape(architecture_metadata(sizes, name), sizes.vocab)
    assert len(shape.layers) == sizes.layers
    assert shape.num_attention_layers == sizes.layers // 4
    assert shape.layers[0] == "delta_net"
    assert shape.layers[-1] == "attention"
    assert shape.attention.group == sizes.q_heads // sizes.kv_heads
    assert shape.delta_net.conv_dim == sizes.conv_dim
    assert shape.delta_net.v_dim == sizes.state_dim
    assert (shape.experts is None) == (sizes.experts == 0)
    assert len(shape.rope.frequencies) == sizes.rope_dim // 2


def test_27b_as_published() -> None:
    shape = read_shape(architecture_metadata(resized(SIZES["27b"], mtp=True), "27B"), 248_320)
    assert (shape.hidden, shape.dense_dim, len(shape.layers)) == (5120, 17_408, 64)
    assert (shape.delta_net.key_size, shape.delta_net.conv_dim) == (2048, 10_240)
    assert shape.attention.group == 6


@pytest.mark.parametrize("key", DENSE_KEYS)
def test_a_missing_key(key: str) -> None:
    metadata = model_metadata(SMALL_DENSE)
    del metadata[key]
    if key in OPTIONAL:
        read_shape(metadata, 97)
    else:
        with pytest.raises(ModelFileError, match=f"{key} is missing"):
            read_shape(metadata, 97)


@pytest.mark.parametrize("key", EXPERT_KEYS)
def test_a_missing_expert_key(key: str) -> None:
    metadata = model_metadata(SMALL_MOE)
    del metadata[key]
    if key.endswith("expert_shared_feed_forward_length"):
        experts = read_shape(metadata, 97).experts
        assert experts is not None
        assert experts.shared_dim == 0
    else:
        with pytest.raises(ModelFileError, match=f"{key} is missing"):
            read_shape(metadata, 97)


@pytest.mark.parametrize("key", [*DENSE_KEYS, "qwen35.nextn_predict_layers"])
@pytest.mark.parametrize("value", MISTAKES, ids=str)
def test_a_value_that_is_none(key: str, value: Any) -> None:
    """Names and the sections of image positions are not read; all else is checked."""
    if key in ("general.name", "qwen35.rope.dimension_sections"):
        return
    is_fine = key.endswith(("freq_base", "epsilon")) and value == 2.5
    is_fine |= key.endswith("nextn_predict_layers") and value == 0 and value is not True
    if is_fine:
        read_shape(changed(key, value), 97)
        return
    with pytest.raises(ModelError) as caught:
        read_shape(changed(key, value), 97)
    assert "\n" not in str(caught.value)


YARN = {
    "qwen35moe.rope.scaling.type": "yarn",
    "qwen35moe.rope.scaling.factor": 4.0,
    "qwen35moe.rope.scaling.original_context_length": 64,
    "qwen35moe.rope.scaling.attn_factor": 1.0,
    "qwen35moe.rope.scaling.yarn_beta_fast": 32.0,
    "qwen35moe.rope.scaling.yarn_beta_slow": 1.0,
}
ALL_KEYS = model_metadata(SMALL_MOE, Form(recurrent_array=True, head_arrays=True)) | YARN
VALUES = (
    st.none() | st.booleans() | st.integers() | st.integers(-1, 9) | st.floats() | st.text()
)  # fmt: skip


@given(key=st.sampled_from(sorted(ALL_KEYS)), value=VALUES | st.lists(VALUES, max_size=6))
def test_no_value_is_anything_but_read_or_refused(key: str, value: Any) -> None:
    try:
        shape = read_shape(ALL_KEYS | {key: value}, 97)
    except ModelError:
        return
    assert shape.layers


@pytest.mark.parametrize("architecture", [None, "llama", "qwen3next", 35])
def test_another_architecture_is_named(architecture: Any) -> None:
    with pytest.raises(UnsupportedModel, match="qwen35"):
        read_shape(changed("general.architecture", architecture), 97)


def test_sizes_that_do_not_fit_together() -> None:
    for key, value in [
        ("qwen35.attention.head_count", 5),
        ("qwen35.rope.dimension_count", 7),
        ("qwen35.rope.dimension_count", 64),
        ("qwen35.ssm.inner_size", 129),
        ("qwen35.ssm.time_step_rank", 3),
        ("qwen35.ssm.conv_kernel", 1),
        ("qwen35.attention.recurrent_layers", [True, True]),
        ("qwen35.nextn_predict_layers", 4),
    ]:
        with pytest.raises(ModelFileError):
            read_shape(changed(key, value), 97)
    with pytest.raises(ModelFileError, match="experts"):
        read_shape(model_metadata(SMALL_MOE) | {"qwen35moe.expert_used_count": 9}, 97)


def test_forms_that_are_not_supported_say_so() -> None:
    for key, value in [
        ("qwen35.attention.value_length", 16),
        ("qwen35.attention.recurrent_layers", [True] * 4),
        ("qwen35.attention.head_count", np.asarray([0, 4, 0, 8])),
        ("qwen35.rope.scaling.type", "longrope"),
    ]:
        metadata = changed(key, value) | {
            "qwen35.rope.scaling.factor": 2.0,
            "qwen35.full_attention_interval": 2,
        }
        with pytest.raises(UnsupportedModel):
            read_shape(metadata, 97)


def test_arrays_over_layers_equal_single_values() -> None:
    sizes = resized(SMALL_DENSE, mtp=True)
    arrays = read_shape(model_metadata(sizes, Form(recurrent_array=True, head_arrays=True)), 97)
    assert arrays == read_shape(model_metadata(sizes), 97)


def test_rope_frequencies() -> None:
    sizes = SIZES["27b"]
    plain = read_shape(architecture_metadata(sizes, "27B"), 1).rope
    assert plain.magnitude == 1.0
    assert plain.frequencies[0] == 1.0
    assert plain.frequencies[31] == pytest.approx(1e7 ** (-62 / 64))
    scaling = {
        "qwen35.rope.scaling.type": "yarn",
        "qwen35.rope.scaling.factor": 4.0,
        "qwen35.rope.scaling.original_context_length": 262_144,
    }
    yarn = read_shape(architecture_metadata(sizes, "27B") | scaling, 1).rope
    assert yarn.magnitude == pytest.approx(1.1386, abs=1e-4)
    assert yarn.frequencies[0] == plain.frequencies[0]
    assert yarn.frequencies[31] == pytest.approx(plain.frequencies[31] / 4)
    scaling["qwen35.rope.scaling.type"] = "linear"
    linear = read_shape(architecture_metadata(sizes, "27B") | scaling, 1).rope
    assert linear.magnitude == 1.0
    np.testing.assert_allclose(linear.frequencies, np.asarray(plain.frequencies) / 4)
