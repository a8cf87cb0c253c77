"""submit, schedule, unschedule against a recording stand-in for KFP's API: the exact bodies, and nothing twice."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from components.stages import CONTAINERS
from pipelines import kfp_api, submit
from pipelines.cli import main
from pipelines.compiled import CompiledPipeline, compile_for
from pipelines.kfp_api import Connection, KfpApi
from pipelines.platform import Profile
from pipelines.retrain import DESCRIPTION
from rfdetr_core.errors import TransientError
from rfdetr_core.storage import Location
from tests.pipelines.kfp_stub import Stub, kfp_stub
from tests.s3_server import s3_root, s3_server

__all__ = ["s3_root", "s3_server"]


@cache
def _compiled(profile: str, images: tuple[tuple[str, str], ...], choices: bool) -> CompiledPipeline:
    return compile_for(Profile.parse(json.loads(profile)), dict(images), choices=choices)


def compile_once(profile: Profile, images: dict[str, str], *, choices: bool) -> CompiledPipeline:
    """The real one, once for each profile: it takes a third of a second."""
    return _compiled(profile.model_dump_json(), tuple(images.items()), choices)


Command = Callable[..., tuple[int, str]]
CONFIG = "name: shapes\ndataset: {uri: s3://bucket/data}\nmodel: {variant: pico}\n"


@pytest.fixture
def stub() -> Iterator[Stub]:
    with kfp_stub() as stub:
        yield stub


@pytest.fixture
def command(
    stub: Stub,
    tmp_path: Path,
    s3_root: Location,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Command:
    """`command("submit", "--set", "train.epochs=3")`: exit code and output; config, images, store, host are given."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(kfp_api, "WAITS", (0.001, 0.001, 0.001))
    monkeypatch.setattr(submit, "compile_for", compile_once)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "no-kubeconfig"))
    monkeypatch.setenv("COLUMNS", "200")
    for name in ("KF_PIPELINES_ENDPOINT", "RFDETR_ROOT", "RFDETR_NAMESPACE", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    Path("config.yaml").write_text(CONFIG)
    images = {stage: f"registry.example/{stage}@sha256:{'ab' * 32}" for stage in CONTAINERS}
    Path("digests.json").write_text(json.dumps(images))

    def run(*arguments: str, given: bool = True) -> tuple[int, str]:
        options = [*arguments]
        if given and arguments[0] in ("submit", "schedule"):
            options += ["--config", "config.yaml", "--digests", "digests.json", "--root", s3_root.uri]
        if given:
            options += ["--host", stub.host]
        monkeypatch.setattr("sys.argv", ["rfdetr-pipeline", *options])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out + printed.err

    return run


def refused(result: tuple[int, str], stub: Stub, words: str, code: int = 2) -> None:
    """One clear line, before anything was created."""
    assert result[0] == code, result[1]
    assert result[1].count("\n") == 1 and result[1].startswith("error: "), result[1]
    assert words in result[1]
    assert stub.changes() == []


# submit


def test_a_run_is_created_from_a_version_named_by_its_content(command: Command, stub: Stub, s3_root: Location) -> None:
    code, output = command("submit", "--set", "train.epochs=3")
    assert code == 0, output
    [experiment], [pipeline], [run] = (stub.posted(f"/v2beta1/{kind}") for kind in ("experiments", "pipelines", "runs"))
    assert experiment["display_name"] == "shapes"
    assert pipeline == {"display_name": "rfdetr-retrain"}
    [version] = stub.kinds["pipeline_versions"]
    assert version["display_name"].startswith("single-gpu-") and len(version["display_name"]) == len("single-gpu-") + 12
    [upload] = stub.posted("/upload_version")
    assert DESCRIPTION.encode() in upload and b"platforms:" in upload
    [uploaded] = (s3_root / "configs").list_files()
    assert (s3_root / "configs" / uploaded.name).read_text() == CONFIG
    name = run["display_name"]
    assert run == {
        "display_name": name,
        "experiment_id": stub.kinds["experiments"][0]["experiment_id"],
        "pipeline_version_reference": {
            "pipeline_id": stub.kinds["pipelines"][0]["pipeline_id"],
            "pipeline_version_id": version["pipeline_version_id"],
        },
        "runtime_config": {
            "parameters": {
                "root": s3_root.uri,
                "config": (s3_root / "configs" / uploaded.name).uri,
                "overrides": {"train": {"epochs": 3}},
                "run_id": name,
                "gpu_type": "nvidia.com/gpu",
                "gpu_count": "1",
            }
        },
    }
    assert f"started: {name}" in output
    assert f"{stub.host}/#/runs/details/{stub.kinds['runs'][0]['run_id']}" in output
    assert f"{s3_root.uri}/runs/{name}" in output
    assert stub.changes() == ["POST /experiments", "POST /pipelines", "POST /pipelines/upload_version", "POST /runs"]


def test_the_same_command_twice_starts_it_once(command: Command, stub: Stub) -> None:
    stub.states = ["RUNNING"]
    assert command("submit")[0] == 0
    before = stub.changes()
    code, output = command("submit")
    assert code == 0 and "found, running: shapes-" in output
    assert stub.changes() == before
    assert command("submit", "--set", "train.epochs=7")[0] == 0  # another one
    assert len(stub.kinds["runs"]) == 2 and len(stub.kinds["pipeline_versions"]) == 1


def test_after_it_has_ended_the_same_command_is_meant_to_run_again(command: Command, stub: Stub) -> None:
    command("submit")
    stub.kinds["runs"][0]["state"] = "SUCCEEDED"
    command("submit")
    first, second = stub.posted("/runs")
    assert second["display_name"] == f"{first['display_name']}-2"
    assert second["runtime_config"]["parameters"]["run_id"] == second["display_name"]
    stub.kinds["runs"][1]["state"] = "FAILED"  # what failed is continued under its own name
    command("submit")
    assert stub.posted("/runs")[2]["display_name"] == second["display_name"]


def test_a_named_run_is_done_once(command: Command, stub: Stub) -> None:
    command("submit", "--run-id", "nightly-7")
    assert stub.posted("/runs")[0]["display_name"] == "nightly-7"
    stub.kinds["runs"][0]["state"] = "SUCCEEDED"
    code, output = command("submit", "--run-id", "nightly-7")
    assert code == 0 and "found, succeeded: nightly-7" in output
    assert len(stub.kinds["runs"]) == 1


def test_lists_are_read_over_all_their_pages(command: Command, stub: Stub) -> None:
    command("submit", "--run-id", "r1")
    first = stub.kinds["runs"][0]
    stub.kinds["runs"] += [{**first, "run_id": f"x{n}", "state": "FAILED"} for n in range(4)]
    stub.kinds["runs"].insert(0, first)
    first["state"] = "FAILED"
    command("submit", "--run-id", "r1")
    looks = [call for call in stub.calls if call.path.endswith("/runs") and call.method == "GET"]
    assert {"2", "4"} <= {call.query.get("page_token", "") for call in looks}


@pytest.mark.parametrize("lost", ["/experiments", "/pipelines", "/pipelines/upload_version", "/runs"])
def test_an_answer_that_got_lost_creates_nothing_twice(command: Command, stub: Stub, lost: str) -> None:
    stub.lost_answers = [lost]
    code, output = command("submit")
    assert code == 0, output
    assert [len(rows) for rows in stub.kinds.values()] == [1, 1, 1, 1, 0]


def test_a_conflict_takes_what_another_one_created(command: Command, stub: Stub) -> None:
    stub.kinds["experiments"].append({"display_name": "shapes", "experiment_id": "theirs"})
    stub.troubles = [("GET /experiments", 500)] * 3  # the last of four tries is answered
    code, output = command("submit")
    assert code == 0, output
    assert stub.posted("/runs")[0]["experiment_id"] == "theirs"


def test_the_profile_names_account_gpus_and_store(
    command: Command, stub: Stub, tmp_path: Path, s3_root: Location
) -> None:
    (tmp_path / "ours.yaml").write_text(
        f"extends: multi-gpu\ndescription: x\nservice_account: trainer\ninputs: {{root: '{s3_root.uri}/ours'}}\n"
        "gpu: {types: [nvidia.com/gpu, nvidia.com/mig-1g.10gb]}\n"
    )
    options = ("--config", "config.yaml", "--digests", "digests.json", "--host", stub.host, "--profile", "ours.yaml")
    gpus = ("--gpu-count", "8", "--gpu-type", "nvidia.com/mig-1g.10gb")
    code, output = command("submit", *options, *gpus, given=False)
    assert code == 0, output
    assert "not checked, for want of a kubeconfig: the profile's Secrets and service account" in output
    [run] = stub.posted("/runs")
    assert run["service_account"] == "trainer"
    parameters = run["runtime_config"]["parameters"]
    assert (parameters["gpu_type"], parameters["gpu_count"]) == ("nvidia.com/mig-1g.10gb", "8")
    assert parameters["root"] == f"{s3_root.uri}/ours"


def test_a_kfp_of_many_users_is_told_the_namespace(command: Command, stub: Stub) -> None:
    stub.multi_user = True
    refused(command("submit"), stub, "shared by several namespaces, and none is named (give --namespace)")
    code, output = command("submit", "--namespace", "team-a")
    assert code == 0, output
    looks = [call for call in stub.calls if call.path.endswith("/experiments") and call.method == "GET"]
    assert looks[-1].query["namespace"] == "team-a"
    assert stub.posted("/experiments")[0]["namespace"] == "team-a"


# bad input: nothing is created


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "train.epoch=3"], "train.epoch: unknown field"),
        (["--overrides", "{"], "overrides: line 1"),
        (["--run-id", "Upper Case"], "--run-id: 'Upper Case' is not allowed"),
        (["--profile", "singel-gpu"], "profile singel-gpu: no such profile (did you mean single-gpu?"),
        (
            ["--gpu-type", "amd.com/gpu"],
            "--gpu-type: 'amd.com/gpu' is not known to the profile single-gpu (one of nvid",
        ),
        (["--gpu-count", "3"], "--gpu-count: 3 does not go with the profile single-gpu (one of 1;"),
        (["--profile", "cpu", "--gpu-count", "1"], "--gpu-count: the profile cpu has no GPU"),
        (["--set", "dataset.uri=data"], "is on this machine, which the cluster does not see (copy it to S3)"),
        (["--timeout", "3"], "--timeout goes with --wait (give it as well)"),
        (["--root", "store"], "--root: store is a folder of this machine"),
        (["--digests", "nowhere.json"], "nowhere.json: no such file (make push REGISTRY=... writes it)"),
        (["--host", "localhost"], "--host: 'localhost' is no http(s) address"),
    ],
)
def test_what_can_be_known_here_is_said_first(
    command: Command, stub: Stub, arguments: list[str], words: str, s3_root: Location
) -> None:
    options = ["--config", "config.yaml", "--digests", "digests.json", "--root", s3_root.uri, "--host", stub.host]
    refused(command("submit", *options, *arguments, given=False), stub, words)
    assert s3_root.list_files() == []


def test_images_without_digest(command: Command, stub: Stub, tmp_path: Path) -> None:
    images = json.loads((tmp_path / "digests.json").read_text()) | {"train": "registry.example/train:latest"}
    (tmp_path / "digests.json").write_text(json.dumps(images))
    refused(command("submit"), stub, "digests.json: has no digest of train")
    code, _ = command("submit", "--unpinned")
    assert code == 0
    assert b"rfdetr-pipeline/train:0.1.0" in stub.posted("/upload_version")[0]


def test_no_host_and_no_kubeconfig(command: Command, stub: Stub, s3_root: Location) -> None:
    options = ("--config", "config.yaml", "--digests", "digests.json", "--root", s3_root.uri)
    refused(command("submit", *options, given=False), stub, "no --host, and no kubeconfig that leads to a cluster")


def test_an_api_that_is_not_there(command: Command, stub: Stub) -> None:
    result = command("submit", "--host", "http://127.0.0.1:9", given=True)
    assert result[0] == 0  # the last --host counts
    code, output = command("wait", "r1", "--host", "http://127.0.0.1:9", given=False)
    assert code == 75
    assert output.startswith("error: cannot reach the API: http://127.0.0.1:9 does not answer: ")
    assert "Connection refused" in output and output.count("\n") == 1


def test_an_api_that_wants_to_know_who_asks(command: Command, stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    stub.token = "secret-of-mine"
    refused(command("submit"), stub, "wants other credentials (401) (put a token into RFDETR_KFP_TOKEN")
    monkeypatch.setenv("RFDETR_KFP_TOKEN", "secret-of-mine")
    code, output = command("submit")
    assert code == 0 and "secret-of-mine" not in output


def test_a_login_page_is_no_answer(command: Command, stub: Stub) -> None:
    """kfp's client takes it for an answer with no fields, and a run that does not exist for one that was started."""
    stub.login_page = True
    refused(command("submit"), stub, "answers, but not as KFP's API does: it sent a web page (is it the right address")


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (403, 2, "cannot look for the experiment shapes: no permission (403): User is not authorized"),
        (404, 2, "cannot look for the experiment shapes: not found (404)"),
        (400, 2, "answers 400"),
        (503, 75, "answers 503"),
    ],
)
def test_an_api_that_refuses(command: Command, stub: Stub, status: int, code: int, words: str) -> None:
    stub.troubles = [("GET /experiments", status)] * 4
    refused(command("submit"), stub, words, code)


def test_an_api_that_does_not_let_create_runs(command: Command, stub: Stub) -> None:
    stub.troubles = [("POST /runs", 403)]
    code, output = command("submit", "--run-id", "r1")
    assert code == 2
    assert output.splitlines()[-1].startswith("error: cannot create the run r1: no permission (403): User is not auth")
    assert stub.kinds["runs"] == []


def test_an_answer_is_not_waited_for_without_end(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    monkeypatch.setattr(kfp_api, "TIMEOUT_SECONDS", (0.2, 0.2))
    monkeypatch.setattr(kfp_api, "WAITS", (0.0,))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        host = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(TransientError, match=r"does not answer: .*(timed out|timeout)"):
            KfpApi(Connection(host))


# schedule


def scheduled(command: Command, cron: str = "0 0 3 * * 1", *more: str) -> tuple[int, str]:
    return command("schedule", "nightly", "--cron", cron, *more)


def test_a_schedule_makes_up_for_nothing_and_runs_one_at_a_time(
    command: Command, stub: Stub, s3_root: Location
) -> None:
    code, output = scheduled(command)
    assert code == 0, output
    [body] = stub.posted("/recurringruns")
    config = (s3_root / "configs" / (s3_root / "configs").list_files()[0].name).uri
    assert body == {
        "display_name": "nightly",
        "experiment_id": stub.kinds["experiments"][0]["experiment_id"],
        "max_concurrency": 1,
        "mode": "ENABLE",
        "no_catchup": True,
        "pipeline_version_reference": {
            "pipeline_id": stub.kinds["pipelines"][0]["pipeline_id"],
            "pipeline_version_id": stub.kinds["pipeline_versions"][0]["pipeline_version_id"],
        },
        "runtime_config": {
            "parameters": {
                "root": s3_root.uri,
                "config": config,
                "overrides": {},
                "run_id": "",  # KFP's id of each run
                "gpu_type": "nvidia.com/gpu",
                "gpu_count": "1",
            }
        },
        "trigger": {"cron_schedule": {"cron": "0 0 3 * * 1"}},
    }
    assert "scheduled: nightly, 0 0 3 * * 1" in output and output.count(" 03:00:00") == 3
    assert "CRON_SCHEDULE_TIMEZONE, UTC unless it is set" in output


def test_the_same_schedule_twice_is_one(command: Command, stub: Stub) -> None:
    scheduled(command)
    stub.kinds["recurring_runs"][0]["max_concurrency"] = "1"  # as the API says it
    before = stub.changes()
    code, output = scheduled(command)
    assert code == 0 and "scheduled already: nightly" in output
    assert stub.changes() == before


def test_another_schedule_of_that_name_takes_its_place(command: Command, stub: Stub) -> None:
    scheduled(command)
    old = stub.kinds["recurring_runs"][0]["recurring_run_id"]
    code, _ = scheduled(command, "0 30 4 * * 0")
    assert code == 0
    [row] = stub.kinds["recurring_runs"]
    assert row["trigger"]["cron_schedule"]["cron"] == "0 30 4 * * 0"
    # Never both at once, never none for longer than it takes.
    assert stub.changes()[-3:] == [
        f"POST /recurringruns/{old}:disable",
        "POST /recurringruns",
        f"DELETE /recurringruns/{old}",
    ]


def test_a_schedule_that_cannot_be_replaced_goes_on(command: Command, stub: Stub) -> None:
    scheduled(command)
    stub.troubles = [("POST /recurringruns", 403)]
    code, output = scheduled(command, "0 30 4 * * 0")
    assert code == 2 and "cannot create the schedule nightly: no permission" in output
    [row] = stub.kinds["recurring_runs"]
    assert (row["trigger"]["cron_schedule"]["cron"], row["mode"]) == ("0 0 3 * * 1", "ENABLE")


def test_a_schedule_of_five_fields_is_refused(command: Command, stub: Stub) -> None:
    words = "--cron: '0 3 * * 1' has 5 fields; KFP's has six: second, minute, hour, day, month, weekday"
    refused(scheduled(command, "0 3 * * 1"), stub, words)


def test_a_schedule_is_removed_by_its_name(command: Command, stub: Stub) -> None:
    scheduled(command)
    refused_before = stub.changes()
    code, output = command("unschedule", "weekly")
    assert (code, output) == (2, "error: no schedule weekly (there are nightly)\n")
    assert stub.changes() == refused_before
    code, output = command("unschedule", "nightly")
    assert (code, output) == (0, "removed the schedule nightly\n")
    assert stub.kinds["recurring_runs"] == []
