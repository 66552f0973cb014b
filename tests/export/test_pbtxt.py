from __future__ import annotations

import pytest
from standin_world import SCHEMA
from tritonclient.grpc import model_config_pb2 as pb

from export import pbtxt
from export.engines import engine_named
from export.graphs import Signature, TensorSpec
from export.pbtxt import ServingOptions
from hsnn_core.errors import PublishError
from hsnn_core.schema import Schema
from hsnn_core.scorer import PAIRS_PER_CALL

SCORER = Signature(
    "scorer_l2",
    (
        TensorSpec("user", "FP32", ("B", 24)),
        TensorSpec("item", "FP32", ("B", "C", 16)),
        TensorSpec("cross_ids", "INT32", ("B", "C", 5)),
    ),
    (TensorSpec("monn", "FP32", ("B", "C", 2)), TensorSpec("logits", "FP32", ("B", "C", 2))),
)
ONNX, PLAN = engine_named("onnxruntime"), engine_named("tensorrt")


def orchestrator(options: ServingOptions | None = None, schema: Schema = SCHEMA) -> pb.ModelConfig:
    return pbtxt.orchestrator_config(schema, 3, 10, (2, 4), options or ServingOptions())


def test_the_orchestrator_speaks_the_schema() -> None:
    config = pbtxt.parse(pbtxt.to_text(orchestrator()), "test")
    assert config == orchestrator()
    inputs = [(t.name, pb.DataType.Name(t.data_type), list(t.dims)) for t in config.input]
    assert inputs == [
        ("age", "TYPE_FP32", [1]),
        ("taste", "TYPE_FP32", [2]),
        ("history", "TYPE_INT64", [4]),
        ("country", "TYPE_INT64", [1]),
        ("exclude_items", "TYPE_INT64", [-1]),
    ]
    assert [t.name for t in config.input if t.optional] == ["exclude_items"]
    outputs = {t.name: (pb.DataType.Name(t.data_type), list(t.dims)) for t in config.output}
    assert outputs == {
        "item_ids": ("TYPE_INT64", [-1]),
        "probabilities": ("TYPE_FP32", [-1, 2]),
        "rank_score": ("TYPE_FP32", [-1]),
        "valid": ("TYPE_INT32", [1]),
        "stage_us": ("TYPE_INT64", [5]),
    }
    assert (config.backend, config.max_batch_size) == ("python", 64)
    facts = {name: value.string_value for name, value in config.parameters.items()}
    assert Schema.from_json(facts.pop("schema")).hash == SCHEMA.hash == facts.pop("schema_hash")
    assert facts == {
        "mode": "bls",
        "k": "10",
        "widths": "2,4",
        "workers": "4",
        "queue": "64",
        "item_log": ".items/log.db",
    }
    assert config.version_policy.latest.num_versions == 1
    assert [(g.count, g.kind) for g in config.instance_group] == [(1, pb.ModelInstanceGroup.KIND_CPU)]


def test_what_a_request_says_of_eligibility_is_optional_and_ragged() -> None:
    section = {
        "market": {"kind": "set", "ask": 2},
        "running": {"kind": "range", "from": "start", "until": "end"},
        "paused": {"kind": "flag"},
        "owner": {"kind": "key"},
    }
    config = orchestrator(schema=Schema.from_dict(SCHEMA.to_dict() | {"eligibility": section}))
    assert [
        (t.name, pb.DataType.Name(t.data_type), list(t.dims), t.allow_ragged_batch)
        for t in config.input
        if t.optional
    ] == [
        ("context_market", "TYPE_INT64", [2], True),
        ("context_running", "TYPE_FP64", [1], True),
        ("exclude_owner", "TYPE_INT64", [-1], True),
        ("exclude_items", "TYPE_INT64", [-1], True),
    ]
    pbtxt.check(config)


def test_options_reach_the_configuration_and_come_back() -> None:
    options = ServingOptions(
        mode="in_process", workers=2, queue=7, keep=3, instances=2, batch_delay_us=500, k=20, widths=(8, 9),
        item_log="/data/items.db",
    )  # fmt: skip
    config = orchestrator(options)
    facts = {name: value.string_value for name, value in config.parameters.items()}
    assert (facts["mode"], facts["k"], facts["widths"]) == ("in_process", "20", "8,9")
    network = pbtxt.network_config(SCORER, ONNX, (), options)
    assert config.version_policy.latest.num_versions == 3
    assert network.version_policy.latest.num_versions == 4
    again = pbtxt.options_of(config, network)
    assert again == ServingOptions(
        mode="in_process",
        workers=2,
        queue=7,
        keep=3,
        instances=2,
        batch_delay_us=500,
        item_log="/data/items.db",
    )


def test_a_network_has_its_graphs_tensors_without_the_batch() -> None:
    config = pbtxt.parse(pbtxt.to_text(pbtxt.network_config(SCORER, ONNX, (), ServingOptions())), "test")
    assert (config.name, config.backend, config.default_model_filename) == (
        "hsnn_scorer_l2",
        "onnxruntime",
        "",
    )
    assert [(t.name, list(t.dims)) for t in config.input] == [
        ("user", [24]),
        ("item", [-1, 16]),
        ("cross_ids", [-1, 5]),
    ]
    assert config.version_policy.latest.num_versions == 2
    assert [g.kind for g in config.instance_group] == [pb.ModelInstanceGroup.KIND_CPU]
    assert [w.batch_size for w in config.model_warmup] == [1]
    assert list(config.model_warmup[0].inputs["item"].dims) == [1, 16]
    assert not config.HasField("dynamic_batching")
    facts = {name: value.string_value for name, value in config.parameters.items()}
    assert facts == {"engine": "onnxruntime", "pairs_per_call": str(PAIRS_PER_CALL)}


def test_tensorrt_runs_on_gpus_with_a_profile_and_a_warmup_per_bucket() -> None:
    config = pbtxt.network_config(SCORER, PLAN, (64, 256), ServingOptions(instances=2))
    assert config.backend == "tensorrt"
    assert [(g.count, g.kind, list(g.profile)) for g in config.instance_group] == [
        (2, pb.ModelInstanceGroup.KIND_GPU, ["0", "1"])
    ]
    assert [list(w.inputs["item"].dims) for w in config.model_warmup] == [[64, 16], [256, 16]]
    assert "pairs_per_call" not in config.parameters, "its buckets say how many"


def test_item_updates_are_a_batch_of_any_size() -> None:
    config = pbtxt.index_config(SCHEMA, ServingOptions(keep=2, item_log="/data/items.db"))
    assert pbtxt.parse(pbtxt.to_text(config), "test") == config
    tensors = {t.name: (pb.DataType.Name(t.data_type), list(t.dims)) for t in (*config.input, *config.output)}
    assert tensors == {
        "updates": ("TYPE_STRING", [-1]),
        "status": ("TYPE_INT32", [-1]),
        "message": ("TYPE_STRING", [-1]),
        "position": ("TYPE_INT64", [1]),
        "stats": ("TYPE_STRING", [1]),
    }
    assert (config.name, config.backend, config.max_batch_size) == ("hsnn_index", "python", 0)
    assert config.version_policy.latest.num_versions == 3
    assert [(g.count, g.kind) for g in config.instance_group] == [(1, pb.ModelInstanceGroup.KIND_CPU)]
    facts = {name: value.string_value for name, value in config.parameters.items()}
    assert facts == {"schema": SCHEMA.to_json(), "schema_hash": SCHEMA.hash, "item_log": "/data/items.db"}


def test_a_flat_index_has_no_widths() -> None:
    config = pbtxt.orchestrator_config(SCHEMA, 1, 10, (), ServingOptions())
    assert config.parameters["widths"].string_value == ""
    assert list(config.output[-1].dims) == [3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "magic"}, "option mode is 'magic', expected bls or in_process"),
        ({"workers": 0}, "option workers is 0, expected at least 1"),
        ({"k": 0}, "option k is 0, expected at least 1"),
        ({"item_log": " "}, "option item_log is empty, expected the path of a file"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(PublishError, match=message):
        ServingOptions(**options)


def test_widths_of_another_depth() -> None:
    with pytest.raises(
        PublishError, match=r"option widths has 3 numbers \[1, 2, 3\], expected 2: one per layer"
    ):
        orchestrator(ServingOptions(widths=(1, 2, 3)))


def broken(change: str) -> pb.ModelConfig:
    config = pbtxt.network_config(SCORER, ONNX, (), ServingOptions())
    if change == "names":
        config.output[0].name = "user"
    elif change == "type":
        config.input[0].data_type = pb.DataType.TYPE_INVALID
    elif change == "dims":
        config.input[0].dims[0] = 0
    elif change == "instances":
        config.instance_group[0].count = 0
    elif change == "warmup":
        config.model_warmup[0].batch_size = 0
    return config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("names", "tensor names repeat: user"),
        ("type", "tensor user has no datatype"),
        ("dims", r"tensor user has dims \[0\], expected -1 or positive"),
        ("instances", "instance counts must be explicit"),
        ("warmup", "model_warmup needs batch_size of at least 1"),
    ],
)
def test_what_triton_would_refuse_or_skip_is_refused(change: str, message: str) -> None:
    with pytest.raises(PublishError, match=f"model hsnn_scorer_l2: {message}"):
        pbtxt.to_text(broken(change))


def test_text_that_is_no_configuration_names_the_file() -> None:
    with pytest.raises(
        PublishError, match=r"repo/config\.pbtxt: not a Triton model configuration: .*no_such_field"
    ):
        pbtxt.parse("no_such_field: 1", "repo/config.pbtxt")


def test_settings_may_change_within_a_generation() -> None:
    pbtxt.check_compatible(orchestrator(), orchestrator(ServingOptions(mode="in_process", k=3, keep=2)))
    old, new = (pbtxt.network_config(SCORER, ONNX, buckets, ServingOptions()) for buckets in ((), (64,)))
    pbtxt.check_compatible(old, new)


def test_tensors_engines_and_profiles_may_not() -> None:
    wider = Signature(
        "scorer_l2", (TensorSpec("user", "FP32", ("B", 32)), *SCORER.inputs[1:]), SCORER.outputs
    )
    fewer = Signature("scorer_l2", SCORER.inputs[:2], SCORER.outputs)
    old = pbtxt.network_config(SCORER, ONNX, (), ServingOptions())
    for signature, engine, difference in (
        (wider, ONNX, r"input user: FP32 \[24\] would become FP32 \[32\]"),
        (fewer, ONNX, r"input cross_ids: INT32 \[-1, 5\] would become absent"),
        (SCORER, PLAN, "backend onnxruntime would become tensorrt"),
    ):
        new = pbtxt.network_config(signature, engine, (), ServingOptions())
        with pytest.raises(PublishError, match=rf"model hsnn_scorer_l2: {difference}; .* new generation"):
            pbtxt.check_compatible(old, new)
    plans = [pbtxt.network_config(SCORER, PLAN, buckets, ServingOptions()) for buckets in ((64,), (64, 128))]
    with pytest.raises(PublishError, match=r"optimisation profiles \['candidates_64'\] would become"):
        pbtxt.check_compatible(*plans)


def test_another_schema_is_named_with_its_first_difference() -> None:
    raw = SCHEMA.to_dict()
    raw["features"]["item"]["category"]["hash"] = 11
    hashes = rf"schema {SCHEMA.hash} would become [0-9a-f]{{16}}"
    with pytest.raises(PublishError, match=hashes + r" \(features\.item\.category\.hash: 9 != 11\)"):
        pbtxt.check_compatible(orchestrator(), orchestrator(schema=Schema.from_dict(raw)))
