"""From YAML and overrides to a RunConfig and back."""

from __future__ import annotations

import json
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rfdetr_core.config import (
    VARIANTS,
    RunConfig,
    dump_yaml,
    load_run_config,
    merge,
    parse_assignments,
    parse_overrides,
    parse_run_config,
)
from rfdetr_core.errors import ConfigError, StorageAccessError
from tests.config.helpers import MINIMAL, run_config

TEXT = """
name: cells
dataset: {uri: s3://data/cells}
model: {variant: small}
train:
  lr: 1e-4
  epochs: 5
  multi_scale: off
"""


def refused(text: str | bytes, overrides: Any = None) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_run_config(text, overrides)
    return str(caught.value)


# --- Reading


def test_reading_yaml_text() -> None:
    config = parse_run_config(TEXT)
    assert config == run_config(model={"variant": "small"}, train={"lr": 1e-4, "epochs": 5, "multi_scale": "off"})
    assert parse_run_config(TEXT.encode()) == config


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_reading_a_file(tmp_path: Path, scheme: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(TEXT)
    assert load_run_config(f"{scheme}{path}") == parse_run_config(TEXT)
    assert load_run_config(f"{scheme}{path}", {"train": {"epochs": 7.0}}).train.epochs == 7
    path.write_text("name: cells")
    with pytest.raises(ConfigError) as caught:
        load_run_config(f"{scheme}{path}")
    assert str(caught.value) == f"{scheme}{path}: dataset.uri: required, and not given"


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StorageAccessError):
        load_run_config(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "config.yaml: is empty (give at least name and dataset.uri)"),
        ("# nothing\n---\n", "config.yaml: is empty (give at least name and dataset.uri)"),
        ("[token]", "config.yaml: must be a mapping (name, dataset, model, train, …), not a list"),
        ("token", "config.yaml: must be a mapping (name, dataset, model, train, …), not text"),
        ("5", "config.yaml: must be a mapping (name, dataset, model, train, …), not a single value"),
        ("name: a\nname: b", 'config.yaml: line 2, column 1: duplicate key "name"'),
        (b"name: \xe4", "config.yaml: line 1, column 7: not UTF-8; save the file as UTF-8"),
        (
            TEXT.replace("epochs: 5", "epochs: 0"),
            "config.yaml: train.epochs: 0 is not allowed: must be at least 1 (use 1)",
        ),
        (TEXT.replace("epochs:", "epoch:"), "config.yaml: train.epoch: unknown field; did you mean train.epochs?"),
        (
            TEXT.replace("1e-4", "-1e-4"),
            "config.yaml: train.lr: -0.0001 is not allowed: must be greater than 0 (use 0.0001)",
        ),
    ],
)  # fmt: skip
def test_refused(text: str | bytes, message: str) -> None:
    assert refused(text) == message


def test_relative_paths_mean_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for given_uri, uri in [
        ("data/cells", f"{tmp_path}/data/cells"),
        ("~/cells", f"{tmp_path}/home/cells"),
        ("/data", "/data"),
        ("s3://b/x", "s3://b/x"),
        ("file:///x", "file:///x"),
    ]:
        assert parse_run_config(f"name: a\ndataset: {{uri: '{given_uri}'}}").dataset.uri == uri


# --- Overrides


@pytest.mark.parametrize("address", ["https://example.org/w.pth?token=secret", "HTTP://example.org/w.pth"])
def test_weights_of_the_web_are_brought_into_the_store_first(address: str) -> None:
    message = refused(TEXT, {"model": {"pretrain_weights": address}})
    assert "model.pretrain_weights: " in message
    assert "is not reached from a pipeline (bring it into the store once, with rfdetr-pipeline weights put" in message
    assert "secret" not in message
    stored = parse_run_config(TEXT, {"model": {"pretrain_weights": "s3://b/weights/w.pth"}})
    assert stored.model.pretrain_weights == "s3://b/weights/w.pth"


def test_a_pipeline_reads_images_of_one_three_and_four_channels() -> None:
    for channels in (1, 3, 4):
        assert parse_run_config(TEXT, {"model": {"num_channels": channels}}).model.num_channels == channels
    assert refused(TEXT, {"model": {"num_channels": 2}}).startswith(
        "model.num_channels: 2 does not go with a pipeline: image files are grey, RGB or RGBA (use 1, 3 or 4;"
    )


def test_overrides_are_laid_over_the_file() -> None:
    config = parse_run_config(TEXT, {"train": {"epochs": 9}, "export": {"opset": 18.0}, "dataset": {"uri": "s3://b/x"}})
    assert (config.train.epochs, config.train.lr, config.export.opset) == (9, 1e-4, 18)
    assert config.dataset.uri == "s3://b/x"
    assert config.model.variant == "small"


def test_overrides_replace_lists_and_set_null() -> None:
    config = parse_run_config(
        TEXT, {"model": {"out_feature_indexes": [1.0, 2.0]}, "train": {"lr_scheduler_kwargs": None}}
    )
    assert config.model.out_feature_indexes == (1, 2)
    text = TEXT + "  seed: 3\n"
    assert parse_run_config(text).train.seed == 3
    assert parse_run_config(text, {"train": {"seed": None}}).train.seed is None
    assert parse_run_config(text, {"train": None}).train.epochs == 100


def test_errors_name_the_overrides_as_well() -> None:
    assert refused(TEXT, {"train": {"epochs": 2.5}}) == (
        "config.yaml with overrides: train.epochs: 2.5 is not allowed: must be a whole number (use 2 or 3)"
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([1], "overrides: must be a mapping, not a list"),
        ([], "overrides: must be a mapping, not a list"),
        ("train", "overrides: must be a mapping, not text"),
        ({1: 2}, "overrides: the key 1 must be text"),
        ({"train": {"notes": {2: 3}}}, "overrides.train.notes: the key 2 must be text"),
    ],
)
def test_overrides_refused(overrides: Any, message: str) -> None:
    assert refused(TEXT, overrides) == message


def test_deep_overrides_are_refused() -> None:
    for make in (lambda below: [below], lambda below: {"a": below}):
        deep: Any = 1
        for _ in range(100):
            deep = make(deep)
        assert refused(TEXT, {"train": {"notes": deep}}) == "overrides: nested deeper than 50"


TREES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.lists(st.integers(0, 3), max_size=2),
    lambda below: st.dictionaries(st.sampled_from("abc"), below, max_size=3),
    max_leaves=10,
)
TREE = st.dictionaries(st.sampled_from("abc"), TREES, max_size=3)


def leaves(tree: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    if isinstance(tree, dict) and tree:
        return {k: v for name, below in tree.items() for k, v in leaves(below, (*path, name)).items()}
    return {path: tree}


@given(TREE, TREE)
def test_merging(base: dict[str, Any], over: dict[str, Any]) -> None:
    before = json.dumps([base, over])
    merged = merge(base, over)
    assert json.dumps([base, over]) == before
    assert merge(merged, over) == merged
    assert merge(base, {}) == base
    assert merge({}, over) == over
    kept, new = leaves(base), leaves(over)
    result = leaves(merged)
    for path, value in new.items():
        if path and value != {}:
            assert result[path] == value
    for path, value in kept.items():
        # What no override touches, above or below, stays.
        if path and all(path[: len(other)] != other and other[: len(path)] != path for other in new):
            assert result[path] == value


def test_any_mapping_may_be_merged() -> None:
    over = MappingProxyType({"a": MappingProxyType({"b": 1}), "c": MappingProxyType({"d": 2})})
    merged = merge({"a": {"x": 0}, "c": 5}, over)
    assert merged == {"a": {"x": 0, "b": 1}, "c": {"d": 2}}
    assert type(merged["c"]) is dict


def test_merged_values_are_copies() -> None:
    base: dict[str, Any] = {"a": [1]}
    over: dict[str, Any] = {"b": {"c": [2]}}
    merged = merge(base, over)
    merged["a"].append(3)
    merged["b"]["c"].append(3)
    assert (base, over) == ({"a": [1]}, {"b": {"c": [2]}})


@pytest.mark.parametrize("new", [variant for variant in VARIANTS if variant != "large-deprecated"])
def test_another_variant_replaces_all_of_the_old_one(new: str) -> None:
    resolved = dump_yaml(run_config(model={"variant": "small"}))
    assert parse_run_config(resolved, {"model": {"variant": new}}).model == run_config(model={"variant": new}).model


def test_another_variant_keeps_what_was_chosen() -> None:
    resolved = dump_yaml(run_config(model={"variant": "small", "dec_layers": 6, "freeze_encoder": True}))
    config = parse_run_config(resolved, {"model": {"variant": "medium"}})
    assert (config.model.dec_layers, config.model.freeze_encoder, config.model.resolution) == (6, True, 576)


@pytest.mark.parametrize("section", ["model", "train"])
def test_another_resolution_takes_the_positional_table_with_it(section: str) -> None:
    resolved = dump_yaml(run_config(model={"variant": "small"}))
    config = parse_run_config(resolved, {section: {"resolution": 640.0}})
    assert config.model == run_config(model={"variant": "small", "resolution": 640}).model
    chosen = dump_yaml(run_config(model={"positional_encoding_size": 20}))
    assert parse_run_config(chosen, {section: {"resolution": 640}}).model.positional_encoding_size == 20


def test_another_resolution_beats_either_spelling_of_the_file() -> None:
    for where in ("model", "train"):
        text = f"name: a\ndataset: {{uri: /x}}\n{where}: {{resolution: 416}}"
        for section in ("model", "train"):
            assert parse_run_config(text, {section: {"resolution": 512}}).model.resolution == 512
        assert (
            parse_run_config(text, {"train": {"resolution": None}, "model": {"resolution": None}}).model.resolution
            == 384
        )


def test_the_record_of_rounding_goes_with_the_resolution() -> None:
    with pytest.warns(UserWarning):
        resolved = dump_yaml(run_config(model={"variant": "medium"}, train={"resolution": 560}))
    assert parse_run_config(resolved, {"model": {"resolution": 640}}).model.requested_resolution is None
    base = parse_run_config(resolved, {"model": {"variant": "base"}}).model
    assert (base.resolution, base.requested_resolution) == (560, None)  # what was asked for, and legal there
    with pytest.warns(UserWarning, match="resolution 560"):
        large = parse_run_config(resolved, {"model": {"variant": "large"}}).model
    assert (large.resolution, large.requested_resolution, large.positional_encoding_size) == (576, 560, 36)


def test_deprecated_spellings_beat_the_file() -> None:
    resolved = dump_yaml(run_config())
    with pytest.warns(FutureWarning):
        assert parse_run_config(resolved, {"train": {"group_detr": 3}}).model.group_detr == 3


# --- JSON and assignments


def test_overrides_from_json() -> None:
    assert parse_overrides(' {"train": {"epochs": 3.0, "seed": null}} ') == {"train": {"epochs": 3.0, "seed": None}}
    assert parse_overrides("") == parse_overrides(" \n") == parse_overrides("{}") == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", 'overrides: must be a JSON object, such as {"train": {"epochs": 3}}'),
        ("null", 'overrides: must be a JSON object, such as {"train": {"epochs": 3}}'),
        ('{"a": 1,\n "a": 2}', 'overrides: duplicate key "a"'),
        ('{"a": {"b": 1, "b": 1}}', 'overrides: duplicate key "b"'),
        ('{"a": NaN}', "overrides: NaN is not a number that JSON has"),
        ('{"a": -Infinity}', "overrides: -Infinity is not a number that JSON has"),
        ("{\n a: 1}", "overrides: line 2, column 2: Expecting property name enclosed in double quotes"),
        ("train.epochs=3", "overrides: line 1, column 1: Expecting value"),
    ],
)
def test_json_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_overrides(text)
    assert str(caught.value) == message


@pytest.mark.parametrize("text", ['{"a":' + "[" * 100_000, '{"a":' + "1" * 5000 + "}"])
def test_monstrous_json_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^overrides: [^\n]{1,200}$"):
        parse_overrides(text)


@pytest.mark.parametrize(
    ("assignments", "values"),
    [
        ([], {}),
        (["train.epochs=3", "train.lr=1e-4", "name=x"], {"train": {"epochs": 3, "lr": 1e-4}, "name": "x"}),
        (["dataset.uri=s3://b/a=b#c d"], {"dataset": {"uri": "s3://b/a=b#c d"}}),
        (["model.out_feature_indexes=[3, 6.0]"], {"model": {"out_feature_indexes": [3, 6.0]}}),
        (["train.notes={a: 1}"], {"train": {"notes": {"a": 1}}}),
        (["train.run='5'", 'name="x"'], {"train": {"run": "5"}, "name": "x"}),
        (["train.seed=", "train.resume=null"], {"train": {"seed": None, "resume": None}}),
        (["train.use_ema=false", "train.multi_scale=off"], {"train": {"use_ema": False, "multi_scale": "off"}}),
        ([" name = x "], {"name": "x"}),
    ],
)
def test_assignments(assignments: list[str], values: dict[str, Any]) -> None:
    assert parse_assignments(assignments) == values


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["train.epochs"], "--set train.epochs: no = in it (write it as train.epochs=3)"),
        (["=3"], "--set =…: not a dotted field (write it as train.epochs=3)"),
        (["train..epochs=3"], "--set train..epochs=…: not a dotted field (write it as train.epochs=3)"),
        (["a=1", "a=1"], "--set a=…: is set twice"),
        (["a.b=1", "a=1"], "--set a=…: is set twice"),
        (["a=1", "a.b=1"], "--set a.b=…: a is set to a value as well"),
        (["a=[1"], "--set a=…: line 1, column 3: expected ',' or ']', but got '<stream end>'"),
    ],
)
def test_assignments_refused(assignments: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_assignments(assignments)
    assert str(caught.value) == message


def test_assignments_are_overrides() -> None:
    overrides = parse_assignments(["train.epochs=8", "model.variant=nano", "train.multi_scale=per-batch"])
    config = parse_run_config(TEXT, overrides)
    assert (config.train.epochs, config.model.variant, config.train.multi_scale) == (8, "nano", "per-batch")


# --- Writing


def test_the_resolved_file_names_what_is_not_built_and_what_was_rounded() -> None:
    with pytest.warns(UserWarning):
        config = run_config(model={"variant": "medium"}, train={"resolution": 560})
    text = dump_yaml(config)
    header = text[: text.index("name: ")]
    assert all(line.startswith("# ") for line in header.splitlines())
    assert "# Resolution 560 was asked for and 576 is used" in header
    for line in config.not_built():
        assert f"#   {line}\n" in header
    assert "\n  resolution: 576\n  requested_resolution: 560\n" in text
    assert "Resolution" not in dump_yaml(run_config())
    assert parse_run_config(text) == config  # and without a second warning


def test_the_order_is_stable() -> None:
    text = dump_yaml(run_config())
    shuffled = RunConfig.parse({"train": {}, "dataset": {"uri": MINIMAL["dataset"]["uri"]}, "name": MINIMAL["name"]})
    assert dump_yaml(shuffled) == text
    top = [line.partition(":")[0] for line in text.splitlines() if line[0] not in "# "]
    assert top == list(RunConfig.model_fields)


def positive(most: int = 1000) -> st.SearchStrategy[int]:
    return st.integers(1, most)


UNIT = st.floats(0, 1, exclude_min=True, exclude_max=True)
TRAIN = {
    "epochs": st.integers(50, 1000),
    "batch_size": positive() | st.just("auto"),
    "grad_accum_steps": positive(),
    "lr": st.floats(0, 1e300, exclude_min=True),
    "lr_encoder": st.floats(0, 1e300),
    "lr_scheduler": st.sampled_from(["step", "cosine"]),
    "lr_min_factor": st.floats(0, 1),
    "warmup_epochs": st.floats(0, 100),
    "drop_path": st.floats(0, 1, exclude_max=True),
    "ema_decay": UNIT,
    "seed": st.none() | st.integers(0, 2**32 - 1),
    "skip_best_epochs": st.integers(0, 49),
    "multi_scale": st.sampled_from(["off", "per-batch", True, False]),
    "progress_bar": st.sampled_from(["tqdm", "rich", None, True, False]),
    "pin_memory": st.none() | st.booleans(),
    "prefetch_factor": st.none() | positive(),
    "amp_dtype": st.sampled_from([None, "auto", "bf16", "fp16"]),
    "aug_config": st.sampled_from([None, {}]),
    "early_stopping_min_delta": st.floats(0, 1),
}
RUNS = st.fixed_dictionaries(
    {
        "name": st.from_regex(r"[a-z0-9][a-z0-9-]{0,62}", fullmatch=True),
        "dataset": st.fixed_dictionaries(
            {
                "uri": st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1).map(lambda t: f"s3://b/{t}")
                | st.sampled_from(["/1e-4", "/null", "/a: b", "/x #y", "s3://b/'\""])
            },
            optional={"format": st.sampled_from(["auto", "coco"]), "reduce": st.booleans()},
        ),
    },
    optional={
        "model": st.fixed_dictionaries(
            {"variant": st.sampled_from([v for v in VARIANTS if v != "large-deprecated"])},
            optional={
                "dec_layers": positive(6),
                "num_queries": st.integers(300, 900),
                "num_classes": st.none() | positive(),
                "gradient_checkpointing": st.booleans(),
            },
        ),
        "train": st.fixed_dictionaries({}, optional=TRAIN),
        "export": st.fixed_dictionaries({}, optional={"logits_tolerance": UNIT, "opset": st.integers(16, 23)}),
        "promote": st.fixed_dictionaries({}, optional={"min_delta": st.floats(-1, 1)}),
        "evaluate": st.none() | st.just({}) | st.fixed_dictionaries({"sample_images": st.integers(0, 99)}),
    },
)


@given(RUNS)
def test_a_resolved_file_read_back_is_equal(values: dict[str, Any]) -> None:
    config = RunConfig.parse(values)
    text = dump_yaml(config)
    again = parse_run_config(text)
    assert again == config
    assert dump_yaml(again) == text
    for section in ("train", "export", "promote"):
        for name, value in values.get(section, {}).items():
            if not isinstance(value, bool):
                assert getattr(getattr(again, section), name) == value


@given(RUNS, st.fixed_dictionaries({}, optional=TRAIN))
def test_overriding_a_file_is_writing_it_so(values: dict[str, Any], train: dict[str, Any]) -> None:
    written = RunConfig.parse(merge(values, {"train": train}))
    overridden = parse_run_config(dump_yaml(RunConfig.parse(values)), parse_overrides(json.dumps({"train": train})))
    assert overridden == written
