"""rfdetr-pipeline models: what people see of the registry, and how they move the champion."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from components.promote import stage as promote
from pipelines import cli
from rfdetr_core.registry import Registry
from rfdetr_core.storage import location
from tests.components.finished_run import NAME, candidate, finished_run


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with three champions in a row, and a version that was not good enough."""
    folder = tmp_path_factory.mktemp("registry")
    root, champion = location(str(folder / "root")), None
    for number, score in enumerate((0.3, 0.4, 0.2, 0.5), start=1):
        settings = {"min_value": 0.1 * number} if score != 0.2 else {}
        place = finished_run(root, f"r{number}", folder / "work", score=score, champion=champion, **settings)
        assert promote.main(["--run-uri", place.uri]) == 0
        if score != 0.2:
            champion = {"version": f"r{number}", **candidate(score)}
    return folder / "root"


@pytest.fixture
def store(filled: Path, tmp_path: Path) -> Path:
    """A copy that may be changed."""
    import shutil

    return Path(shutil.copytree(filled, tmp_path / "root"))


def models(store: Path, capsys: pytest.CaptureFixture[str], *arguments: str, root: bool = True) -> tuple[int, str]:
    """Exit code and all output of `rfdetr-pipeline models`."""
    capsys.readouterr()
    given = [*arguments, *(["--root", str(store)] if root else [])]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setenv("COLUMNS", "200")
        patch.setattr(sys, "argv", ["rfdetr-pipeline", "models", *given])
        cli.main()
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out + captured.err


def champion(store: Path) -> str:
    found = Registry(location(str(store)), NAME).champion()
    assert found is not None
    return found.version


def test_list(filled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, output = models(filled, capsys, "list")
    assert code == 0
    rows = [line.split("│")[1:6] for line in output.splitlines() if "│ cells" in line]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["cells", "r1", "", "0.300", "0.300"],
        ["cells", "r2", "", "0.400", "0.400"],
        ["cells", "r3", "", "0.200", "0.200"],
        ["cells", "r4", "champion", "0.500", "0.500"],
    ]
    assert models(filled, capsys, "list", "birds")[1].startswith("no versions of birds in ")


def test_show_prints_the_chain_from_the_model_to_the_images(filled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, output = models(filled, capsys, "show", NAME)
    assert code == 0
    assert output.startswith("cells r4 (champion)\n")
    assert "champions before it: r1, r2\n" in output
    manifest = Registry(location(str(filled)), NAME).manifest("r4")
    chain = output[output.index("\nmodel.onnx ") :]
    links = [manifest.files["model.onnx"].sha256, "77" * 32, "runs/r4, seed 7", "random weights", "compared with   r2"]
    links += [
        "registry/train@sha256:1",
        "on dataset      d1",
        "s3://data/cells",
        "90 images, 300 boxes",
        "of classes      cell",
    ]
    places = [chain.index(link) for link in links]
    assert places == sorted(places)
    assert "cells r3\n" in models(filled, capsys, "show", NAME, "r3")[1]


def test_diff_names_what_differs(filled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, output = models(filled, capsys, "diff", NAME, "r1", "r2")
    assert code == 0
    rows = {line.split("│")[1].strip(): line for line in output.splitlines() if line.startswith("│")}
    assert "+0.1000" in rows["map"]
    assert {"0.1", "0.2"} <= set(rows["promote.min_value"].replace("│", " ").split())
    assert "train.epochs" not in rows  # equal in both
    assert "r4" in models(filled, capsys, "diff", NAME, "r1")[1]  # with the champion


def test_promote_is_a_persons_decision_and_recorded_as_one(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, output = models(store, capsys, "promote", NAME, "r3")
    assert (code, output) == (0, "r3 is the champion of cells now; before: r4\n")
    found = Registry(location(str(store)), NAME).champion()
    assert found is not None and (found.version, found.metrics["map"], found.test_digest) == ("r3", 0.2, "abc")
    assert found.by != "gate" and found.history[-1]["version"] == "r4" and found.history[-1]["by"] == "gate"
    assert models(store, capsys, "promote", NAME, "r3") == (0, "r3 is the champion of cells already\n")


def test_rollback_goes_back_step_by_step(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert models(store, capsys, "rollback", NAME) == (0, "r2 is the champion of cells again; r4 stays registered\n")
    assert models(store, capsys, "rollback", NAME)[0] == 0
    assert champion(store) == "r1"
    code, output = models(store, capsys, "rollback", NAME)
    assert code == 2 and "r1 is the first champion of cells: there is none before it" in output
    assert models(store, capsys, "promote", NAME, "r4")[0] == 0
    assert champion(store) == "r4"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["show", "../secrets"], "'../secrets' is no name of a model"),
        (["show", "a/b"], "'a/b' is no name of a model"),
        (["show", NAME, "x/y"], "'x/y' is no version"),
        (["show", NAME, "r9"], "cells has no version r9 (versions: r1, r2, r3, r4)"),
        (["show", "birds"], "birds has no champion"),
        (["promote", NAME, "r9"], "cells has no version r9"),
        (["rollback", "birds"], "birds has no champion"),
        (["diff", NAME, "r1", "r9"], "cells has no version r9"),
    ],
)
def test_what_is_not_there_is_told_in_one_line(
    filled: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    code, output = models(filled, capsys, *arguments)
    assert code == 2
    assert output.startswith("error: ") and said in output and output.count("\n") == 1


@pytest.mark.parametrize("damage", ["gone", "cut short", "altered"])
def test_a_version_that_is_not_whole_becomes_no_champion(
    store: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    onnx = store / "models" / NAME / "versions" / "r2" / "model.onnx"
    if damage == "gone":
        onnx.unlink()
    else:
        onnx.write_bytes(onnx.read_bytes()[:-1] + (b"" if damage == "cut short" else b"X"))
    if damage != "altered":  # which only reading all of it can tell
        output = models(store, capsys, "list")[1]
        assert "damaged" in output and "champion" in output
    for arguments in (["rollback", NAME], ["promote", NAME, "r2"]):
        code, output = models(store, capsys, *arguments)
        assert code == 2 and "model.onnx" in output, output
        assert champion(store) == "r4"


def test_without_a_store_it_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RFDETR_ROOT", raising=False)
    code, output = models(tmp_path, capsys, "list", root=False)
    assert code == 2 and "no store to look into (give --root" in output
