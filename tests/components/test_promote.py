"""The promote stage: what it registers, whom it makes champion, and what it refuses to do."""

from __future__ import annotations

import json
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from components.promote import stage as promote
from components.runtime import StageContext, StopFlag
from rfdetr_core.config import load_run_config
from rfdetr_core.errors import ChampionChangedError
from rfdetr_core.publication import MANIFEST, fetch, read_manifest
from rfdetr_core.registry import Champion, Registry
from rfdetr_core.storage import Location, location
from tests.components.finished_run import NAME, candidate, finished_run
from tests.processes import output_of
from tests.storage.conftest import moto_root, s3_root, s3_server

__all__ = ["moto_root", "s3_root", "s3_server"]


@pytest.fixture
def root(tmp_path: Path) -> Location:
    return location(str(tmp_path / "root"))


def promoted(root: Location) -> Champion:
    found = Registry(root, NAME).champion()
    assert found is not None
    return found


def run(place: Location) -> int:
    return promote.main(["--run-uri", place.uri])


def decision(place: Location) -> dict[str, Any]:
    found: dict[str, Any] = (place / "promote/decision.json").read_json()
    return found


def test_a_version_is_all_that_speaks_for_the_model(root: Location, tmp_path: Path) -> None:
    place = finished_run(root, "r1", tmp_path / "work", score=0.5)
    assert run(place) == 0
    assert (decision(place)["outcome"], decision(place)["guarded"]) == ("promote", True)
    version = Registry(root, NAME).version("r1")
    manifest = read_manifest(version)
    assert manifest is not None and set(manifest.files) == {
        *("model.onnx", "model.safetensors", "model.json", "checkpoint_best_total.pth", "parity.json", "latency.json"),
        *("metrics.json", "report.html", "config.yaml", "provenance.json", "README.md"),
    }
    champion = promoted(root)
    assert (champion.version, champion.test_digest, champion.by, champion.history) == ("r1", "abc", "gate", ())
    assert champion.metrics["map"] == 0.5
    card = (version / "README.md").read_text()
    assert card.startswith("# cells, version r1\n")
    for said in ("AP 50:95 | 0.500", "| cell | 9 | 0.500", "`d1`", "s3://data/cells", "**promote**: map 0.5000"):
        assert said in card
    made = (place / "provenance.json").read_json()
    assert made == (version / "provenance.json").read_json()
    assert (made["seed"], made["dataset"]["digest"], made["classes"][0]["name"]) == (7, "d1", "cell")
    assert made["stages"]["train"]["image"] == "registry/train@sha256:1"
    assert made["publications"]["export"]["files"]["model.onnx"] == manifest.files["model.onnx"].sha256
    assert made["config"]["name"] == NAME
    assert made["parent"] == {"pretrain_weights": None, "champion": None}


def test_a_better_one_follows_and_a_worse_one_is_kept_out(root: Location, tmp_path: Path) -> None:
    assert run(finished_run(root, "r1", tmp_path / "work", score=0.5)) == 0
    old = {"version": "r1", **candidate(0.5)}
    worse = finished_run(root, "r2", tmp_path / "work", score=0.4, champion=old)
    assert run(worse) == 0
    assert decision(worse)["outcome"] == "keep"
    assert decision(worse)["version"] is not None  # registered all the same: a person may still choose it
    better = finished_run(root, "r3", tmp_path / "work", score=0.6, champion=old)
    assert run(better) == 0
    assert [row["version"] for row in promoted(root).history] == ["r1"]
    assert promoted(root).version == "r3"
    assert (better / "provenance.json").read_json()["parent"]["champion"] == "r1"
    refused = finished_run(root, "r4", tmp_path / "work", score=0.9, champion=old, max_size_mb=1e-6)
    assert run(refused) == 0
    assert (decision(refused)["outcome"], decision(refused)["version"]) == ("refuse", None)
    assert Registry(root, NAME).versions() == ["r1", "r2", "r3"]


def test_a_stale_pointer_ends_with_75_and_changes_nothing(
    root: Location, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = finished_run(root, "other", tmp_path / "work", score=0.5, test_digest="other images")
    late = finished_run(root, "late", tmp_path / "work", score=0.6)  # evaluated before there was a champion
    assert run(other) == 0
    assert run(late) == 75
    said = capsys.readouterr().out
    assert "champion changed to other since the evaluation (start the run again with the same run id" in said
    assert promoted(root).version == "other"
    assert not (late / "promote" / MANIFEST).exists()


def test_of_eight_racing_gates_exactly_one_wins(moto_root: Location, tmp_path: Path) -> None:
    """All have evaluated against the same champion; those that come second learn it and change nothing."""
    assert run(finished_run(moto_root, "r0", tmp_path / "work", score=0.5)) == 0
    champion = {"version": "r0", **candidate(0.5)}
    start = threading.Barrier(8)
    for number in range(1, 9):
        finished_run(moto_root, f"r{number}", tmp_path / "work", score=0.5 + number / 100, champion=champion)
    move = Registry.move

    def together(registry: Registry, *arguments: Any, **settings: Any) -> None:
        start.wait(60)  # every gate has read and decided
        move(registry, *arguments, **settings)

    def gate(number: int) -> bool:
        place = moto_root / "runs" / f"r{number}"
        scratch = tmp_path / f"scratch-{number}"
        (scratch / "out").mkdir(parents=True)
        context = StageContext(
            stage=promote.STAGE,
            config=load_run_config((place / "config.yaml").uri),
            root=moto_root,
            run=place,
            work=scratch,
            output=scratch / "out",
            inputs="",
            attempt="",
            stop=StopFlag(),
        )
        try:
            promote.body(context)
        except ChampionChangedError:
            return False
        return True

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(8) as pool:
        patch.setattr(Registry, "move", together)
        won = list(pool.map(gate, range(1, 9)))
    assert sum(won) == 1
    winner = f"r{won.index(True) + 1}"
    assert promoted(moto_root).version == winner
    assert [row["version"] for row in promoted(moto_root).history] == ["r0"]
    # Another try of the others is decided on what the new champion's own evaluation recorded of the same images.
    loser = next(number for number in range(1, 9) if f"r{number}" != winner)
    assert run(moto_root / "runs" / f"r{loser}") == 0
    outcome = decision(moto_root / "runs" / f"r{loser}")["outcome"]
    assert outcome == ("promote" if loser > int(winner[1:]) else "keep")


def test_an_unguarded_store_is_refused_until_it_is_allowed(
    s3_root: Location, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(finished_run(s3_root, "r1", tmp_path / "work", score=0.5)) == 2
    said = capsys.readouterr().out
    assert "this store ignores conditional writes" in said and "promote.allow_unguarded_store: true" in said
    assert Registry(s3_root, NAME).champion() is None
    assert run(finished_run(s3_root, "r2", tmp_path / "work", score=0.5, allow_unguarded_store=True)) == 0
    assert promoted(s3_root).version == "r2"
    assert decision(s3_root / "runs/r2")["guarded"] is False


def test_kill_9_at_every_write_leaves_the_old_champion_or_the_new_one(tmp_path: Path) -> None:
    code, output = output_of([sys.executable, "-m", "tests.components.kill_promote", str(tmp_path)], timeout=200)
    assert code == 0, output
    writes, old, new = map(int, output.split())
    # status twice, a probe, eleven files and their manifest, the pointer, provenance, decision, manifest, log
    assert writes >= 20
    assert old + new == writes + 1
    assert old > 10 and new > 3


# Bad input


def test_an_onnx_file_that_was_cut_short_after_the_export(
    root: Location, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = finished_run(root, "r1", tmp_path / "work", score=0.5)
    onnx = Path(place.uri) / "export" / "model.onnx"
    onnx.write_bytes(onnx.read_bytes()[:-3])
    assert run(place) == 2
    assert "model.onnx has 7 bytes, and 10 were published" in capsys.readouterr().out
    assert Registry(root, NAME).champion() is None and Registry(root, NAME).versions() == []


def test_a_registry_that_cannot_be_written(root: Location, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = finished_run(root, "r1", tmp_path / "work", score=0.5)
    (Path(root.uri) / "models").write_text("in the way")  # root may write into read-only folders
    assert run(place) == 2
    assert "cannot " in capsys.readouterr().out
    assert (place / "status/promote.json").read_json()["error"]["class"].endswith("Error")
    assert not (place / "promote" / MANIFEST).exists()


def test_a_champion_whose_files_are_gone_can_still_be_followed(root: Location, tmp_path: Path) -> None:
    assert run(finished_run(root, "r1", tmp_path / "work", score=0.5)) == 0
    Registry(root, NAME).version("r1").delete_tree()
    better = finished_run(root, "r2", tmp_path / "work", score=0.6, champion={"version": "r1", **candidate(0.5)})
    assert run(better) == 0
    assert promoted(root).version == "r2"


def test_a_run_that_won_before_it_could_say_so_says_it_now(root: Location, tmp_path: Path) -> None:
    place = finished_run(root, "r1", tmp_path / "work", score=0.5)
    assert run(place) == 0
    before = read_manifest(Registry(root, NAME).version("r1"))
    assert promote.main(["--run-uri", place.uri, "--force"]) == 0
    assert decision(place)["reason"] == "this run is the champion already"
    assert read_manifest(Registry(root, NAME).version("r1")) == before
    assert json.loads((fetch(place / "promote", tmp_path) / "decision.json").read_text())["outcome"] == "promote"
