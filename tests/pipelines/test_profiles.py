"""Profiles: strict, and what is wrong with one is said in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.cluster_checks import wanted_secrets
from pipelines.platform import load_profile, profile_names
from rfdetr_core.errors import ConfigError

HEAD = "extends: single-gpu\ndescription: x\n"


def profile(tmp_path: Path, text: str, head: str = HEAD) -> Path:
    path = tmp_path / "ours.yaml"
    path.write_text(head + text)
    return path


@pytest.mark.parametrize("name", profile_names())
def test_every_profile_has_room(name: str) -> None:
    found = load_profile(name)
    assert found.name == name and found.description
    assert found.stage("train").retry.limit >= found.stage("promote").retry.limit
    assert found.stage("notify").timeout_seconds <= 600


def test_what_a_file_says_is_merged_over_what_it_extends(tmp_path: Path) -> None:
    found = load_profile(str(profile(tmp_path, "stages: {train: {memory: 99Gi}}\ndefaults: {labels: {team: a}}\n")))
    base = load_profile("single-gpu")
    assert (found.name, found.stage("train").memory) == ("ours", "99Gi")
    assert found.stage("train").shm == base.stage("train").shm
    assert found.stage("notify").labels == {"team": "a"} == found.stage("train").labels


def test_a_file_may_stand_alone(tmp_path: Path) -> None:
    found = load_profile(str(profile(tmp_path, "", head="description: the least\n")))
    assert found.gpu is None and found.stage("train").cpu == "1"


def test_credentials_come_from_a_secret_or_from_the_account(tmp_path: Path) -> None:
    assert load_profile("cpu").secrets("train") == () and wanted_secrets(load_profile("cpu")) == {}
    text = "s3: {secret: store, ca_secret: ca}\nimage_pull_secrets: [pull]\n"
    text += "stages: {notify: {secrets: [{secret: chat, entries: {u: HOOK}}, "
    text += "{secret: x, entries: {a: B}, optional: true}]}}"
    assert wanted_secrets(load_profile(str(profile(tmp_path, text)))) == {
        "store": {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"},
        "ca": {"ca.crt"},
        "pull": set(),
        "chat": {"u"},
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("stages: {trian: {cpu: '1'}}", "stages.trian: unknown field; did you mean stages.train?"),
        ("stages: {train: {memmory: 1Gi}}", "stages.train.memmory: unknown field; did you mean stages.train.memory?"),
        ("stages: {train: {cpu: 4}}", "stages.train.cpu: 4 is not allowed: must be text"),
        ("stages: {train: {cpu: '0'}}", "must be a number of cores as text, such as 4, 0.5 or 500m"),
        ("stages: {train: {memory: 16GB}}", 'stages.train.memory: "16GB" is not allowed: must be a size such as 16Gi'),
        ("stages: {train: {shm: 48Gi}}", 'stages.train.shm: "48Gi" is not allowed: must be less than memory 48Gi'),
        ("stages: {promote: {gpus: 1}}", "stages.promote.gpus: 1 is not allowed: this stage does not compute on a GPU"),
        ("stages: {train: {gpus: 2}}", "stages.train.gpus: 2 is not allowed: must be one of gpu.counts (use 1)"),
        ("gpu: {type: amd.com/gpu}", 'gpu.type: "amd.com/gpu" is not allowed: must be one of gpu.types'),
        ("gpu: {types: [gpu]}", "must be a resource that nodes offer, with its vendor"),
        (
            "stages: {train: {timeout_seconds: 1}}",
            "stages.train.timeout_seconds: 1 is not allowed: must be at least 60",
        ),
        ("stages: {train: {retry: {limit: -1}}}", "stages.train.retry.limit: -1 is not allowed"),
        ("stages: {train: {labels: {a: true}}}", "stages.train.labels.a: true is not allowed"),
        ("stages: {train: {node_selector: {'a b': c}}}", "must be a name such as nvidia.com/gpu"),
        ("stages: {train: {tolerations: [{operator: Exists, value: a}]}}", "does not go with operator Exists"),
        ("stages: {train: {tolerations: [{effect: NoSchedule}]}}", "required with operator Equal"),
        ("stages: {train: {tolerations: [{key: a, seconds: 3}]}}", "goes with effect NoExecute only"),
        ("stages: {train: {affinity: [{match: [{key: a}]}]}}", "operator In takes some"),
        (
            "stages: {train: {affinity: [{match: [{key: a, operator: Gt, values: ['1', '2']}]}]}}",
            "operator Gt takes one",
        ),
        ("stages: {train: {secrets: [{secret: A, entries: {a: B}}]}}", "must be the name of a Kubernetes object"),
        (
            "stages: {train: {secrets: [{secret: a, entries: {a: 'B C'}}]}}",
            "must be the name of an environment variable",
        ),
        ("stages: {train: 3}", "stages.train: 3 is not allowed: must be a mapping of fields"),
        ("stages: []", "defaults and stages must be mappings"),
        ("security: {run_as_user: 0}", "security.run_as_user: 0 is not allowed: must be at least 1"),
        ("s3: {endpoint: x}", "s3.endpoint: unknown field; did you mean s3.endpoint_url?"),
        ("inputs: {root: 'http://x'}", 'inputs.root: "http://x" is not allowed: must be a path, file:///path or s3://'),
        ("extends: gpu", "duplicate key"),
        ("priority_class: high", "priority_class: unknown field"),
    ],
)
def test_what_is_wrong_is_one_clear_line(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_profile(str(profile(tmp_path, text)))
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert "ours.yaml" in str(caught.value)


def test_gpus_need_the_section_that_names_them(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the section gpu is missing, which says of what type"):
        load_profile(str(profile(tmp_path, "stages: {train: {gpus: 1}}", head="extends: cpu\ndescription: x\n")))


def test_a_base_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"ours.yaml: extends: cpus: no such profile \(did you mean cpu\? there are cpu, "
    ):
        load_profile(str(profile(tmp_path, "", head="extends: cpus\ndescription: x\n")))


@pytest.mark.parametrize("name", ["single", "./nowhere.yaml", "../profiles/cpu"])
def test_a_profile_that_does_not_exist(name: str) -> None:
    with pytest.raises(
        ConfigError, match=r"no such profile \(.*there are cpu, multi-gpu, multi-node, single-gpu, spot-gpu; or give"
    ):
        load_profile(name)
