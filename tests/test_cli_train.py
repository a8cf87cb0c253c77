"""`python -m rfdetr_core` train, evaluate, export, predict: a real training of drawn images, and what is refused."""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import onnx
import pytest
import yaml

from rfdetr_core import RFDETR, cli, hardware
from rfdetr_core.__main__ import main
from rfdetr_core.config import load_run_config
from rfdetr_core.training import checkpoint
from rfdetr_core.training.engine import Engine
from tests.training import tiny

MODEL = {name: value for name, value in tiny.MODEL.items() if name != "num_classes"}
TRAIN: dict[str, Any] = {**tiny.TRAIN, "epochs": 1, "batch_size": 2, "grad_accum_steps": 1}


@pytest.fixture(autouse=True)
def settled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the commands do to their process is not done to that of the tests, only noted."""
    calls: list[str] = []
    monkeypatch.setattr(hardware, "keep_freed_memory", lambda: calls.append("keep_freed_memory"))
    for name in ("OMP_NUM_THREADS", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, os.environ.get(name, "1"))
    return calls


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.draw(tmp_path_factory.mktemp("drawn") / "coco")


@pytest.fixture(scope="module")
def config(coco: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The YAML of a run, as the pipeline reads it."""
    return written(tmp_path_factory.mktemp("config") / "run.yaml", coco)


def written(path: Path, coco: Path, **sections: Any) -> Path:
    content = {"name": "shapes", "dataset": {"uri": str(coco)}, "model": MODEL, "train": TRAIN, **sections}
    path.write_text(yaml.safe_dump(json.loads(json.dumps(content))))
    return path


def program(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "rfdetr_core", *map(str, arguments)]


@pytest.fixture(scope="module")
def trained(config: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The folder of a training by the command, and what the command said."""
    output = tmp_path_factory.mktemp("trained") / "output"
    command = program("train", "--config", config, "--output-dir", output)
    return output, subprocess.run(command, capture_output=True, text=True, check=True)


@pytest.fixture
def weights(trained: tuple[Path, Any]) -> str:
    return str(trained[0] / checkpoint.BEST_TOTAL)


def rows(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class TestTrain:
    def test_leaves_a_detector_and_says_where(
        self, trained: tuple[Path, subprocess.CompletedProcess[str]], config: Path
    ) -> None:
        output, done = trained
        best = output / checkpoint.BEST_TOTAL
        summary, where = done.stdout.splitlines()
        assert where == str(best)
        result = json.loads((output / cli.RESULT).read_text())
        assert summary == (
            f"1 epochs, 5 optimizer steps; best: {result['best_source']} weights of epoch 1, "
            f"mAP {result['best_score']:.3f}"
        )
        assert RFDETR.from_checkpoint(best).class_names == ("rectangle", "ellipse", "triangle")
        assert load_run_config(output / "config.yaml") == load_run_config(config)
        assert "WARNING training starts from random weights" in done.stderr
        assert "INFO epoch 1/1 done" in done.stderr

    def test_the_same_command_again_does_nothing(
        self,
        trained: tuple[Path, Any],
        config: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        output, done = trained
        monkeypatch.setattr(Engine, "optimizer_step", None)
        assert main(["train", "--config", str(config), "--output-dir", str(output)]) == 0
        assert capsys.readouterr().out == done.stdout

    def test_what_is_set_wins_over_the_file(self, config: Path, coco: Path, tmp_path: Path) -> None:
        elsewhere = tiny.draw(tmp_path / "other", train=12)
        output = tmp_path / "output"
        command = ["train", "--config", str(config), "--output-dir", str(output), "--dataset-dir", str(elsewhere)]
        assert main([*command, "--set", "train.epochs=2", "--set", "model.num_queries=6"]) == 0
        assert [row["step"] for row in rows(output)] == [5, 11]
        assert RFDETR.from_checkpoint(output / checkpoint.BEST_TOTAL).config.num_queries == 6
        assert load_run_config(output / "config.yaml").dataset.uri == str(elsewhere)

    def test_what_was_found_in_the_dataset_is_said(
        self, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        source = tiny.draw(tmp_path / "source")
        shutil.rmtree(source / "valid")
        command = ["train", "--config", str(config), "--output-dir", str(tmp_path / "output")]
        assert main([*command, "--dataset-dir", str(source)]) == 0
        assert "note: split absent from the source: taken from train by the hash of" in capsys.readouterr().err

    @pytest.mark.parametrize("given", ["option", "yaml"])
    def test_pretrained_weights(self, weights: str, coco: Path, tmp_path: Path, given: str) -> None:
        start = checkpoint.load(Path(weights))["model"]
        still = {**TRAIN, "lr": 1e-12, "lr_encoder": 1e-12}
        model = MODEL if given == "option" else {**MODEL, "pretrain_weights": weights}
        config = written(tmp_path / "run.yaml", coco, train=still, model=model)
        option = ["--pretrain-weights", weights] if given == "option" else []
        output = tmp_path / "output"
        assert main(["train", "--config", str(config), "--output-dir", str(output), *option]) == 0
        found = checkpoint.load(output / checkpoint.BEST_TOTAL)["model"]
        assert not [name for name, value in found.items() if not value.allclose(start[name], atol=1e-6)]
        assert json.loads((output / "weights.json").read_text())["missing"] == []

    @staticmethod
    def continues(command: list[str], folder: Path, epochs: int, capsys: pytest.CaptureFixture[str]) -> None:
        """The same command goes on from the checkpoint that a stopped one left."""
        steps = checkpoint.load(folder / checkpoint.LATEST)["position"]["global_step"]
        assert 5 <= steps < 5 * epochs
        assert main(command) == 0
        said = capsys.readouterr()
        assert said.out.startswith(f"{epochs} epochs, {5 * epochs} optimizer steps; ")
        assert f"continuing after epoch {steps // 5}, optimizer step {steps}\n" in said.err
        assert [row["epoch"] for row in rows(folder)] == list(range(epochs))

    @pytest.mark.slow
    def test_sigterm_leaves_a_checkpoint_that_the_same_command_continues(
        self, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        command = ["train", "--config", str(config), "--output-dir", str(tmp_path), "--set", "train.epochs=12"]
        process = subprocess.Popen(program(*command), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        with process:
            deadline = time.monotonic() + 120
            while not rows(tmp_path) and time.monotonic() < deadline and process.poll() is None:
                time.sleep(0.01)
            process.send_signal(signal.SIGTERM)
            out, err = process.communicate(timeout=60)
        assert process.returncode == 143, err
        assert out == ""
        assert err.splitlines()[-1].startswith("error: stopped on request after ")
        assert "Traceback" not in err
        self.continues(command, tmp_path, 12, capsys)

    def test_ctrl_c_leaves_one_as_well(
        self, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Told to this process, in the second of three epochs."""
        command = ["train", "--config", str(config), "--output-dir", str(tmp_path), "--set", "train.epochs=3"]
        step = Engine.optimizer_step

        def interrupted(engine: Engine, *args: Any, global_step: int, **words: Any) -> Any:
            if global_step == 7:
                os.kill(os.getpid(), signal.SIGINT)
            return step(engine, *args, global_step=global_step, **words)

        with monkeypatch.context() as patch:
            patch.setattr(Engine, "optimizer_step", interrupted)
            assert main(command) == 143
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.splitlines()[-1].startswith("error: stopped on request after ")
        self.continues(command, tmp_path, 3, capsys)

    def test_the_second_signal_does_not_wait(self) -> None:
        stop = cli._Stop()
        with pytest.raises(cli.Terminated, match=r"stopped by SIGTERM \(run the same command again"):
            stop.handle(signal.SIGTERM, None)  # before training has begun
        stop.deferred = True
        stop.handle(signal.SIGINT, None)
        assert stop.requested
        with pytest.raises(cli.Terminated, match="stopped by SIGINT"):
            stop.handle(signal.SIGINT, None)

    def test_handlers_and_log_are_as_before(self, trained: tuple[Path, Any], config: Path) -> None:
        def state() -> tuple[Any, ...]:
            ours = logging.getLogger("rfdetr_core")
            return signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT), ours.level, list(ours.handlers)

        before = state()
        assert main(["train", "--config", str(config), "--output-dir", str(trained[0])]) == 0
        assert state() == before

    def test_threads_and_memory_are_set_for_the_machine(
        self, monkeypatch: pytest.MonkeyPatch, settled: list[str]
    ) -> None:
        monkeypatch.delenv("OMP_NUM_THREADS")
        monkeypatch.setenv("GOMP_SPINCOUNT", "7")
        monkeypatch.setattr(hardware, "cpu_count", lambda: 3)
        with cli.speaking():
            assert (os.environ["OMP_NUM_THREADS"], os.environ["GOMP_SPINCOUNT"]) == ("3", "7")
        assert settled == ["keep_freed_memory"]


class TestUse:
    """evaluate, predict and export of the trained weights say what the Python API says."""

    def test_evaluate(self, weights: str, coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out = tmp_path / "metrics.json"
        command = ["evaluate", "--weights", weights, "--dataset-dir", str(coco), "--num-workers", "0"]
        assert main([*command, "--split", "valid", "--max-dets", "20", "--json", str(out)]) == 0
        metrics = RFDETR.from_checkpoint(weights).evaluate(
            dataset_dir=coco, split="valid", eval_max_dets=20, num_workers=0
        )
        found = json.loads(out.read_text())
        assert (found.pop("weights"), found.pop("dataset"), found.pop("split")) == (weights, str(coco), "valid")
        assert found == metrics.to_json()
        said = capsys.readouterr().out.splitlines()
        assert said[0].startswith(f"mAP {metrics.map:.3f}  mAP50 {metrics.map50:.3f}  ")
        assert [line.split(":")[0] for line in said[2:]] == ["  rectangle", "  ellipse", "  triangle"]

        assert main(command) == 0
        test = capsys.readouterr().out.splitlines()
        assert [line.rsplit("  ", 1)[1] for line in test[2:]] != [line.rsplit("  ", 1)[1] for line in said[2:]]

    def test_predict(self, weights: str, coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        images = [str(path) for path in sorted((coco / "valid").glob("*.jpg"))[:2]]
        out = tmp_path / "found.json"
        assert main(["predict", "--weights", weights, *images, "--threshold", "0.01", "--json", str(out)]) == 0
        expected = RFDETR.from_checkpoint(weights).predict(images, threshold=0.01)
        found = json.loads(out.read_text())
        assert [row["image"] for row in found] == images
        said = capsys.readouterr().out.splitlines()
        for row, prediction in zip(found, expected, strict=True):
            assert len(row["detections"]) == len(prediction) > 0
            assert f"{row['image']}: {len(prediction)} found" in said
            for detection, name, score, box in zip(
                row["detections"], prediction.class_names, prediction.scores, prediction.boxes, strict=True
            ):
                assert detection["class_name"] == name
                assert detection["score"] == pytest.approx(score)
                assert detection["box"] == pytest.approx(list(box))
        best = found[0]["detections"][0]
        assert said[1].startswith(f"  {best['class_name']} {best['score']:.3f}  {best['box'][0]:.1f} ")

        assert main(["predict", "--weights", weights, images[0], "--threshold", "1"]) == 0
        assert capsys.readouterr().out == f"{images[0]}: 0 found\n"

    def test_export(self, weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        command = ["export", "--weights", weights, "--output-dir", str(tmp_path)]
        assert main([*command, "--set", "export.opset=18", "--set", "export.parity_images=1"]) == 0
        path = tmp_path / "rfdetr-pico.onnx"
        assert capsys.readouterr().out == f"{path}\n"
        assert {entry.domain: entry.version for entry in onnx.load(path).opset_import}[""] == 18


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a command says when it refuses."""
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    errors = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert said.err.splitlines()[-1:] == errors
    assert "Traceback" not in said.err
    return errors[0].removeprefix("error: ")


class TestBadInput:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--set", "train.epoch=3"], "train.epoch: unknown field; did you mean train.epochs?"),
            (["--set", "train.epochs"], "--set train.epochs: no = in it (write it as train.epochs=3)"),
            (["--set", "train.epochs=0"], "train.epochs: 0 is not allowed: must be at least 1 (use 1)"),
            (["--set", "train.output_dir=x"], "train.output_dir: belongs to the Python API"),
            (["--dataset-dir", "x", "--set", "dataset.uri=y"], "say the same (give one of them)"),
            (["--dataset-dir", "s3://bucket/data"], "is no folder of this machine (give a local copy"),
            (["--dataset-dir", "nowhere"], "nowhere"),
            (["--set", "dataset.reduce=false"], "dataset.reduce: false is not possible here"),
            (["--set", "dataset.format=yolo"], "data.yaml"),
            (["--set", "dataset.format=yolo", "--set", "train.dataset_file=coco"], "contradicts dataset.format: yolo"),
            (["--pretrain-weights", "no.pth"], "no.pth"),
        ],
    )
    def test_train(
        self, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
    ) -> None:
        output = tmp_path / "output"
        assert message in refused(["train", "--config", str(config), "--output-dir", str(output), *options], capsys)
        assert not list(output.glob("*.pth"))

    def test_a_config_that_is_not_there(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert "none.yaml" in refused(["train", "--config", str(tmp_path / "none.yaml")], capsys)

    def test_another_training_in_the_folder(
        self, trained: tuple[Path, Any], config: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        command = ["train", "--config", str(config), "--output-dir", str(trained[0])]
        assert "give another output_dir" in refused([*command, "--set", "train.lr=0.5"], capsys)
        assert load_run_config(trained[0] / "config.yaml").train.lr == 1e-4  # the folder stays as it was

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--split", "train"], "split"),
            (["--batch-size", "0"], "batch_size: 0 is not allowed"),
            (["--max-dets", "0"], "eval_max_dets: 0 is not allowed"),
            (["--num-workers", "-1"], "num_workers: -1 is not allowed"),
            (["--json", "no/such/folder.json"], "give a file in a folder that exists"),
            (["--dataset-dir", "nowhere"], "nowhere"),
            (["--weights", "none.pth"], "none.pth"),
        ],
    )
    def test_evaluate(
        self, weights: str, coco: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
    ) -> None:
        assert message in refused(["evaluate", "--weights", weights, "--dataset-dir", str(coco), *options], capsys)

    def test_predict(self, weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        text = tmp_path / "text.jpg"
        text.write_text("no picture")
        assert "text.jpg: cannot be read" in refused(["predict", "--weights", weights, str(text)], capsys)
        assert "threshold: 2.0" in refused(["predict", "--weights", weights, str(text), "--threshold", "2"], capsys)
        assert str(tmp_path) in refused(["predict", "--weights", weights, str(text), "--json", str(tmp_path)], capsys)

    def test_export(self, weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        command = ["export", "--weights", weights, "--output-dir", str(tmp_path), "--set"]
        assert "opset: 3 is not allowed" in refused([*command, "export.opset=3"], capsys)
        assert "export has no such section" in refused([*command, "train.lr=1"], capsys)
        assert not list(tmp_path.iterdir())

    def test_a_mistyped_config_is_told_before_torch_is_loaded(self, config: Path) -> None:
        code = (
            "import sys; from rfdetr_core.__main__ import main; "
            f"code = main(['train', '--config', {str(config)!r}, '--set', 'train.epoch=3']); "
            "print(code, 'torch' in sys.modules)"
        )
        assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "2 False\n"


@pytest.mark.filterwarnings("default")
def test_warnings_become_lines_of_the_log(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--set", "train.num_select=5", "--set", "dataset.reduce=false"]  # the second ends it at once
    assert main(["train", "--config", str(config), *options]) == 2
    said = capsys.readouterr().err.splitlines()
    assert "WARNING train.num_select is deprecated: give model.num_select" in said[0]
    assert len(said) == 2


@pytest.mark.slow
def test_the_page_on_the_command_line_tells_the_truth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its commands run, in order; on fewer and smaller images."""
    root = Path(__file__).parents[1]
    (tmp_path / "examples").symlink_to(root / "examples")
    monkeypatch.chdir(tmp_path)
    block = (root / "docs" / "cli.md").read_text().split("```")[1]
    commands = [shlex.split(line) for line in block.replace("\\\n", " ").strip().splitlines()]
    smaller = {
        "data": ["--train", "6", "--valid", "2", "--test", "2", "--size", "64"],
        "train": [f"--set=model.{field}" for field in ("resolution=32", "num_queries=8", "num_select=8")],
    }
    for program, dash_m, package, *arguments in commands:
        assert (program, dash_m, package) == (".venv/bin/python", "-m", "rfdetr_core")
        assert main([*arguments, *smaller.get(arguments[0], [])]) == 0, arguments
    assert [arguments[3] for arguments in commands] == ["data", "train", "evaluate", "predict", "export"]
    assert {"checkpoint_best_total.pth", "test.json", "found.json", "rfdetr-pico.onnx"} <= {
        path.name for path in (tmp_path / "runs" / "trained").iterdir()
    }
