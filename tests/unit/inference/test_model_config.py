"""ModelConfig as text and JSON: what is read, what is refused and by which name, and back."""

from __future__ import annotations

import json

import pytest
from google.protobuf import json_format
from hypothesis import given, settings
from hypothesis import strategies as st

from mlmesh_inference.catalog import ReadyModel
from mlmesh_inference.oip.config_fields import ENTRIES_MAX
from mlmesh_inference.oip.describe_config import config
from mlmesh_inference.oip.model_config import CONFIG_BYTES_MAX, read_json, read_text
from mlmesh_inference.serving import (
    BatchingConfig,
    ControlInput,
    ControlKind,
    Fill,
    QueueConfig,
    SampleInput,
    SequenceConfig,
    ServingConfig,
    StateConfig,
    Step,
    TensorConfig,
    VersionPolicy,
    WarmupSample,
)
from mlmesh_runtime.errors import InvalidInput, MeshError, Unsupported
from open_inference import model_config_pb2
from tests.support.inference import GatedEngine, ready_model

FULL = b"""
# A comment.
name: "m"
platform: "onnxruntime_onnx"
backend: "onnxruntime"
max_batch_size: 16
input [{ name: "x" data_type: TYPE_FP32 dims: [ 4 ] format: FORMAT_NONE },
       { name: "image" data_type: TYPE_UINT8 format: FORMAT_NHWC dims: [ 8, 8, 3 ] optional: true }]
output { name: "y" data_type: TYPE_STRING dims: -1 label_filename: "labels/y.txt" }
version_policy { specific { versions: [ 1, 3 ] } }
instance_group [{ count: 2 kind: KIND_CPU }, { kind: KIND_CPU }]
dynamic_batching {
  preferred_batch_size: [ 4, 8 ]
  max_queue_delay_microseconds: 100
  priority_levels: 3
  default_priority_level: 2
  default_queue_policy { max_queue_size: 50 default_timeout_microseconds: 1000 allow_timeout_override: true }
  priority_queue_policy { key: 1 value { max_queue_size: 7 } }
}
default_model_filename: "nets/m.onnx"
parameters { key: "mlmesh.precision" value { string_value: "bf16" } }
model_warmup {
  name: "one" batch_size: 2 count: 3
  inputs { key: "x" value { data_type: TYPE_FP32 dims: 4 random_data: true } }
}
optimization { input_pinned_memory { enable: true } }
response_cache { enable: false }
"""


def test_a_full_file() -> None:
    assert read_text(FULL) == ServingConfig(
        name="m",
        platform="onnxruntime_onnx",
        backend="onnxruntime",
        rows_max=16,
        inputs=(
            TensorConfig(name="x", datatype="FP32", dims=(4,)),
            TensorConfig(name="image", datatype="UINT8", dims=(8, 8, 3), optional=True, layout="NHWC"),
        ),
        outputs=(TensorConfig(name="y", datatype="BYTES", dims=(-1,), labels_file="labels/y.txt"),),
        batching=BatchingConfig(
            preferred_rows=(4, 8),
            delay_us=100,
            priorities=3,
            priority_default=2,
            queue=QueueConfig(items_max=50, timeout_us=1000, timeout_override=True),
            queues={1: QueueConfig(items_max=7, timeout_override=False)},
        ),
        versions=VersionPolicy(numbers=(3, 1)),
        instances=3,
        device="cpu",
        model_file="nets/m.onnx",
        parameters={"mlmesh.precision": "bf16"},
        warmups=(
            WarmupSample(
                name="one",
                rows=2,
                count=3,
                inputs=(SampleInput(name="x", datatype="FP32", dims=(4,), fill=Fill.RANDOM),),
            ),
        ),
    )


def test_an_empty_file_says_nothing() -> None:
    assert read_text(b"") == read_json("{}") == ServingConfig()


@pytest.mark.parametrize(
    ("text", "rows_max"),
    [(b"max_batch_size: 0", 0), (b"max_batch_size:8", 8), (b"# max_batch_size: 0", None), (b'name: "m"', None)],
)
def test_no_batching_is_not_the_same_as_not_said(text: bytes, rows_max: int | None) -> None:
    assert read_text(text).rows_max == rows_max


def test_json_takes_both_spellings_and_numbers_as_text() -> None:
    assert read_json('{"max_batch_size": "16"}').rows_max == 16
    assert read_json('{"maxBatchSize": 16}').rows_max == 16
    assert read_json('{"max_batch_size": 0}').rows_max == 0


def test_a_sequence() -> None:
    said = read_text(
        b"""
        sequence_batching {
          max_sequence_idle_microseconds: 5000000
          control_input [
            { name: "START" control [ { kind: CONTROL_SEQUENCE_START fp32_false_true: [ 0, 1 ] } ] },
            { name: "ID" control [ { kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_UINT64 } ] }
          ]
          state { input_name: "h" output_name: "hn" data_type: TYPE_FP32 dims: [ 2, 128 ] }
          oldest { max_candidate_sequences: 9 }
        }
        """
    )
    assert said.sequence == SequenceConfig(
        states=(StateConfig(input="h", output="hn", datatype="FP32", dims=(2, 128)),),
        controls=(
            ControlInput(name="START", kind=ControlKind.START, datatype="FP32", false=0.0, true=1.0),
            ControlInput(name="ID", kind=ControlKind.CORRELATION_ID, datatype="UINT64"),
        ),
        idle_us=5_000_000,
        sequences_max=9,
    )


def test_an_ensemble() -> None:
    said = read_text(
        b"""
        platform: "ensemble"
        ensemble_scheduling { step [
          {
            model_name: "a" model_version: -1
            input_map { key: "x" value: "raw" } output_map { key: "y" value: "mid" }
          },
          {
            model_name: "b" model_version: 3
            input_map { key: "x" value: "mid" } output_map { key: "y" value: "out" }
          }
        ] }
        """
    )
    assert said.steps == (
        Step(model="a", version=0, inputs={"x": "raw"}, outputs={"y": "mid"}),
        Step(model="b", version=3, inputs={"x": "mid"}, outputs={"y": "out"}),
    )
    assert said.engine == ""


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("instance_group { rate_limiter { priority: 1 } }", "config.instance_group[0].rate_limiter"),
        ("instance_group { gpus: 1 kind: KIND_GPU }", "config.instance_group[0].gpus"),
        ("instance_group [{ kind: KIND_CPU }, { kind: KIND_GPU }]", "config.instance_group"),
        ("response_cache { enable: true }", "config.response_cache.enable"),
        ('batch_input { target_name: "x" }', "config.batch_input"),
        ('input { name: "x" reshape { shape: 1 } }', "config.input[0].reshape"),
        ('input { name: "x" allow_ragged_batch: true }', "config.input[0].allow_ragged_batch"),
        ("optimization { cuda { graphs: true } }", "config.optimization.cuda"),
        (
            "dynamic_batching { default_queue_policy { timeout_action: DELAY } }",
            "config.dynamic_batching.default_queue_policy.timeout_action",
        ),
        (
            "sequence_batching { direct { max_queue_delay_microseconds: 5 } }",
            "config.sequence_batching.direct.max_queue_delay_microseconds",
        ),
        ('ensemble_scheduling { step { model_name: "a" model_namespace: "n" } }', "step[0].model_namespace"),
        ('model_operations { op_library_filename: "x.so" }', "config.model_operations"),
        ('model_repository_agents { agents { name: "a" } }', "config.model_repository_agents"),
        ('cc_model_filenames { key: "7.5" value: "x" }', "config.cc_model_filenames"),
        ('runtime: "libx.so"', "config.runtime"),
    ],
)
def test_what_is_not_carried_out_is_refused_by_name(text: str, field: str) -> None:
    with pytest.raises(Unsupported, match=r"not supported|only GPU 0") as caught:
        read_text(text.encode())
    assert field in caught.value.message


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("no_such_field: 1", "no_such_field"),
        ("input {", "malformed"),
        ("\x00", "malformed"),
        ('input { name: "" }', "config.input[0].name"),
        ('input [{ name: "x" }, { name: "x" }]', "config.input: 'x' is there twice"),
        ('input { name: "x" dims: -2 }', "config.input[0].dims"),
        (f'input {{ name: "x" dims: {[1] * 17} }}', "at most 16 dimensions"),
        ('input { name: "x" data_type: 99 }', "config.input[0].data_type"),
        ('input { name: "x" format: FORMAT_NCHW dims: [ 1 ] }', "3 dimensions of an image"),
        ('output { name: "y" label_filename: "../secret" }', "config.output[0].label_filename"),
        ('default_model_filename: "/etc/passwd"', "config.default_model_filename"),
        ("max_batch_size: -1", "config.max_batch_size"),
        ("instance_group { count: 100000 }", "config.instance_group[0].count"),
        ("version_policy { specific { versions: [ 0 ] } }", "config.version_policy.specific"),
        ("dynamic_batching { preferred_batch_size: 0 }", "preferred_batch_size"),
        ("dynamic_batching { priority_levels: 2 }", "default_priority_level"),
        ("dynamic_batching { priority_levels: 2 default_priority_level: 3 }", "default_priority_level"),
        ("dynamic_batching { default_priority_level: 3 }", "priority_levels"),
        ('sequence_batching { control_input { name: "S" } }', "expected 1 control, got 0"),
        (
            'sequence_batching { control_input { name: "S" control { fp32_false_true: [ 0 ] } } }',
            "two values",
        ),
        ("ensemble_scheduling { }", "at least 1 step"),
        ('model_warmup { name: "w" inputs { key: "x" value { dims: 1 } } }', "config.model_warmup[0].inputs[x]"),
        ('model_warmup { name: "w" count: 100000 }', "at most 1000 runs"),
    ],
)
def test_what_is_wrong_is_refused_by_name(text: str, named: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        read_text(text.encode())
    assert named in caught.value.message
    assert len(caught.value.message) < 600


def test_sizes_are_bounded() -> None:
    with pytest.raises(InvalidInput, match="bytes of configuration"):
        read_text(b"#" * (CONFIG_BYTES_MAX + 1))
    with pytest.raises(InvalidInput, match="bytes of configuration"):
        read_json(" " * (CONFIG_BYTES_MAX + 1))
    entries = " ".join(f'parameters {{ key: "{n}" value {{}} }}' for n in range(ENTRIES_MAX + 1))
    with pytest.raises(InvalidInput, match=r"config\.parameters: expected at most 1024 entries"):
        read_text(entries.encode())


@pytest.mark.parametrize(
    "text", ["[" * 10_000, '{"a": ' * 1000, '"parameters": {"config": {{"x": 1}}}', "nonsense", "[]"]
)
def test_json_that_is_none_is_malformed(text: str) -> None:
    with pytest.raises(InvalidInput, match="malformed"):
        read_json(text)


@settings(max_examples=60)
@given(st.binary(max_size=200) | st.lists(st.sampled_from(FULL.split(b"\n")), max_size=30).map(b"\n".join))
def test_anything_else_raises_only_what_callers_may_see(data: bytes) -> None:
    try:
        said = read_text(data)
    except MeshError:
        return
    assert isinstance(said, ServingConfig)


@settings(max_examples=60)
@given(
    st.text(max_size=100)
    | st.dictionaries(
        st.sampled_from([field.name for field in model_config_pb2.ModelConfig.DESCRIPTOR.fields]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
            lambda inner: (
                st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["name", "dims", "count"]), inner)
            ),
            max_leaves=6,
        ),
        max_size=4,
    ).map(json.dumps)
)
def test_any_json_raises_only_what_callers_may_see(text: str) -> None:
    try:
        said = read_json(text)
    except MeshError:
        return
    assert isinstance(said, ServingConfig)


async def test_the_effective_configuration_loads_again_as_it_is() -> None:
    engine = GatedEngine()
    model = ready_model(engine, rows_max=16, rows_preferred=4)
    said = ServingConfig(
        batching=BatchingConfig(
            preferred_rows=(4,), priorities=2, priority_default=1, queues={2: QueueConfig(items_max=3)}
        ),
        inputs=(TensorConfig(name="x", datatype="FP32", dims=(4,)),),
        parameters={"mlmesh.engine": "onnxruntime"},
        warmups=(WarmupSample(name="w", rows=1, inputs=(SampleInput(name="x", datatype="FP32", dims=(4,)),)),),
        decoupled=True,
    )
    effective = config(_serving(model, said))
    model.runner.abort()
    again = read_json(json.dumps(json_format.MessageToDict(effective, preserving_proto_field_name=True)))
    assert (again.name, again.rows_max, again.versions) == ("m", 16, VersionPolicy(numbers=(1,)))
    assert again.batching is not None
    assert again.batching.queue.items_max == 256
    assert (again.batching.priorities, again.batching.queues[2].items_max) == (2, 3)
    assert again.parameters == said.parameters
    assert again.warmups == said.warmups
    assert again.decoupled
    assert config(_serving(model, again)) == effective


async def test_the_effective_configuration_of_sequences_and_ensembles_loads_again() -> None:
    sequence = SequenceConfig(
        states=(StateConfig(input="h", output="hn", datatype="FP32", dims=(2,)),),
        controls=(
            ControlInput(name="S", kind=ControlKind.START, datatype="INT32", true=1),
            ControlInput(name="R", kind=ControlKind.READY, datatype="BOOL", true=True),
            ControlInput(name="I", kind=ControlKind.CORRELATION_ID, datatype="BYTES"),
        ),
        sequences_max=5,
    )
    steps = (Step(model="a", inputs={"x": "x"}, outputs={"y": "y"}),)
    model = ready_model(GatedEngine())
    model.runner.abort()
    for said in (ServingConfig(sequence=sequence), ServingConfig(steps=steps)):
        again = read_json(json_format.MessageToJson(config(_serving(model, said))))
        assert (again.sequence, again.steps) == (said.sequence, said.steps)


def _serving(model: ReadyModel, said: ServingConfig) -> ReadyModel:
    return ReadyModel(
        name=model.name,
        version=model.version,
        platform=model.platform,
        signature=model.signature,
        policy=model.policy,
        runner=model.runner,
        statistics=model.statistics,
        config=said,
    )
