"""The whole DAG through the command line, on a real S3 server, with a real (tiny) training."""

from __future__ import annotations

import json
import math
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from components.stages import STAGES
from rfdetr_core.data.prepared import PreparedDataset
from rfdetr_core.data.sample import write_sample_dataset
from rfdetr_core.publication import MANIFEST, read_manifest
from rfdetr_core.storage import location
from tests.processes import output_of, without_settings

CONFIG = """
name: shapes
dataset: {uri: data}
model: {variant: pico, resolution: 64, num_queries: 10, num_select: 10, group_detr: 2}
train: {epochs: 1, batch_size: 4, grad_accum_steps: 1, num_workers: 0, multi_scale: off, seed: 0}
promote: {allow_unguarded_store: true}
"""


class Project(NamedTuple):
    """A folder with a dataset and a config, and the run that was made in it."""

    folder: Path
    output: str
    seconds: float = math.nan  # of processors, in all processes of the run

    @property
    def root(self) -> Path:
        """The store of the S3 server, as files."""
        return self.folder / "runs" / "s3" / "rfdetr"

    @property
    def run(self) -> Path:
        return self.root / "runs" / "r1"

    def json(self, name: str) -> Any:
        return json.loads((self.run / name).read_text())


def processor_seconds() -> float:
    """What all processes took that this one started and that have ended: it is the same on a loaded machine."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def rfdetr_pipeline(folder: Path, *arguments: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "pipelines", *arguments]
    return output_of(command, folder=folder, environment=without_settings(), timeout=280)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    folder = tmp_path_factory.mktemp("project")
    write_sample_dataset(folder / "data", train=24, valid=8, test=8, size=96)
    (folder / "config.yaml").write_text(CONFIG)
    started = processor_seconds()
    code, output = rfdetr_pipeline(folder, "run", "--config", "config.yaml", "--run-id", "r1")
    assert code == 0, output
    return Project(folder, output, processor_seconds() - started)


@pytest.mark.slow
def test_every_stage_publishes_what_the_design_names(project: Project) -> None:
    wanted = {
        "dataset": {"dataset.json", "report.json", "report.html"},
        "probe": {"probe.json", "probe.png", "report.html"},
        "train": {"metrics.jsonl", "metrics.csv", "result.json", "checkpoints/checkpoint_best_total.pth"},
        "evaluate": {"metrics.json", "report.html", "detections.json", "confusion.json"},
        "export": {"model.onnx", "parity.json", "latency.json"},
        "promote": {"decision.json"},
    }
    for folder, names in wanted.items():
        manifest = read_manifest(location(str(project.run / folder)))
        assert manifest is not None, folder
        assert names <= set(manifest.files), folder
    assert (project.run / "config.yaml").exists() and (project.run / "provenance.json").exists()
    assert project.json("summary.json")["state"] == "succeeded"
    assert project.json("status/notify.json")["told"] == "nobody: notify.webhook_secret_env is null"
    for stage in STAGES:
        assert project.json(f"status/{stage}.json")["state"] == "succeeded"
        assert (project.run / "logs" / f"{stage}.log").read_text()


@pytest.mark.slow
def test_the_table_names_stages_times_results_and_settings(project: Project) -> None:
    for stage, folder in zip(STAGES, ("dataset", "probe", "train", "evaluate", "export", "promote"), strict=True):
        assert re.search(rf"│ {stage} +│ succeeded +│ +[\d.]+ s │ runs/s3/rfdetr/runs/r1/{folder} +│", project.output)
    assert "train.epochs 1" in project.output and "model.num_queries 10" in project.output
    assert "promotion: promote" in project.output and "unguarded store" in project.output


@pytest.mark.slow
def test_the_champion_points_to_a_whole_version(project: Project) -> None:
    pointer = json.loads((project.root / "models" / "shapes" / "champion.json").read_text())
    assert pointer["version"] == "r1"
    version = project.root / "models" / "shapes" / "versions" / "r1"
    manifest = read_manifest(location(str(version)))
    assert manifest is not None
    files = {
        "model.onnx",
        "model.safetensors",
        "checkpoint_best_total.pth",
        "metrics.json",
        "provenance.json",
        "README.md",
    }
    assert files <= set(manifest.files)
    assert pointer["test_digest"] == project.json("evaluate/metrics.json")["test_digest"]
    assert project.json("promote/decision.json")["guarded"] is False


@pytest.mark.slow
def test_the_metrics_can_be_recomputed_from_what_lies_beside_them(project: Project) -> None:
    """Promise 4: pycocotools on detections.json gives the numbers of metrics.json."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    prepared = project.root / project.json("dataset/dataset.json")["location"]
    truth = COCO(str(prepared / "test" / "annotations.coco.json"))
    evaluation = COCOeval(truth, truth.loadRes(str(project.run / "evaluate" / "detections.json")), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    found = project.json("evaluate/metrics.json")["candidate"]["coco"]
    assert list(found.values()) == pytest.approx(list(evaluation.stats), abs=1e-9)


@pytest.mark.slow
def test_the_pipeline_s_page_shows_scores_confusion_and_report(project: Project) -> None:
    """What KFP keeps of the task: its UI draws these."""
    [path] = (project.folder / "runs" / "kfp" / "r1").glob("*/evaluate/executor_output.json")
    artifacts = json.loads(path.read_text())["artifacts"]
    shown = {name: found["artifacts"][0] for name, found in artifacts.items()}
    metrics, confusion = project.json("evaluate/metrics.json"), project.json("evaluate/confusion.json")
    assert shown["metrics"]["metadata"]["candidate_map"] == metrics["candidate"]["map"]
    drawn = shown["confusion"]["metadata"]["confusionMatrix"]
    assert [spec["displayName"] for spec in drawn["annotationSpecs"]] == confusion["classes"]
    assert [row["row"] for row in drawn["rows"]] == confusion["matrix"]
    assert Path(shown["report"]["uri"]).read_bytes() == (project.run / "evaluate" / "report.html").read_bytes()


@pytest.mark.slow
def test_the_promoted_onnx_finds_what_the_detections_file_says(project: Project) -> None:
    """The exported model, with the file's own metadata for pre-processing, gives the evaluated detections."""
    import onnxruntime

    path = project.root / "models" / "shapes" / "versions" / "r1" / "model.onnx"
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    (side, _), names = json.loads(metadata["resolution"]), json.loads(metadata["class_names"])
    prepared = project.root / project.json("dataset/dataset.json")["location"]
    split = PreparedDataset(prepared).split("test")
    image = split.decode(0)
    pixels = np.asarray(image.resize((side, side), 2), dtype=np.float32).transpose(2, 0, 1)[None] / 255
    mean, std = (np.array(json.loads(metadata[k]), dtype=np.float32).reshape(3, 1, 1) for k in ("mean", "std"))
    dets, labels = session.run(["dets", "labels"], {"input": (pixels - mean) / std})
    assert labels.shape[2] == len(names) + 1
    scores = 1 / (1 + np.exp(-labels[0]))
    query, label = np.unravel_index(scores[:, : len(names)].argmax(), scores[:, : len(names)].shape)
    best = max(
        (d for d in project.json("evaluate/detections.json") if d["image_id"] == 1), key=lambda d: float(d["score"])
    )
    cx, cy, w, h = dets[0, query] * np.array([image.width, image.height] * 2)
    assert best["category_id"] == label + 1
    assert best["score"] == pytest.approx(float(scores[query, label]), abs=1e-4)
    x1, y1 = max(0.0, cx - w / 2), max(0.0, cy - h / 2)
    assert best["bbox"][:2] == pytest.approx([x1, y1], abs=0.05)


@pytest.mark.slow
def test_the_same_run_id_again_does_nothing_quickly(project: Project) -> None:
    before = {p: p.stat().st_mtime_ns for p in project.run.rglob("*") if p.is_file() and "/status/" not in str(p)}
    started, work = time.monotonic(), processor_seconds()
    code, output = rfdetr_pipeline(project.folder, "run", "--config", "config.yaml", "--run-id", "r1")
    seconds, work = time.monotonic() - started, processor_seconds() - work
    assert code == 0
    assert output.count("already done: s3://rfdetr/runs/r1/") == len(STAGES)
    assert len(re.findall(r"│ already done │", output)) == len(STAGES)
    # A fifth of the work of the run itself, 9 s on a quiet machine; half of it, if every stage loaded torch.
    assert work < project.seconds / 3
    assert seconds < 60
    changed = {p.name for p, mtime in before.items() if p.stat().st_mtime_ns != mtime}
    told = {"summary.json", "summary.md", "notify.log"}
    assert changed <= {"config.yaml", *told, *(f"{stage}.log" for stage in STAGES)}


@pytest.mark.slow
def test_a_failing_stage_ends_the_run_and_names_cause_and_remedy(project: Project) -> None:
    """Only export is changed, so the stages before it are done; it fails, and promote is not reached."""
    decision = (project.run / "promote" / "decision.json").read_bytes()
    champion = (project.root / "models" / "shapes" / "champion.json").read_bytes()
    changes = ("--set", "export.logits_tolerance=1e-30", "--set", "notify.webhook_secret_env=NOT_SET_ANYWHERE")
    code, output = rfdetr_pipeline(project.folder, "run", "--config", "config.yaml", "--run-id", "r1", *changes)
    assert code == 2  # notify, which fails as well, changes nothing of that
    assert project.json("summary.json")["failed_stage"] == "export_onnx"
    assert "NOT_SET_ANYWHERE" in project.json("status/notify.json")["error"]["message"]
    assert output.count("already done: s3://rfdetr/runs/r1/") == 4
    assert re.search(r"│ export_onnx +│ failed ", output) and re.search(r"│ promote +│ not started ", output)
    assert "export_onnx failed with exit code 2: model.onnx differs from the trained model" in output
    assert "Traceback" not in output
    status = project.json("status/export_onnx.json")
    assert (status["stage"], status["exit_code"], status["error"]["class"]) == ("export_onnx", 2, "ExportError")
    assert "export.logits_tolerance is 1e-30" in status["error"]["hint"]
    manifest = json.loads((project.run / "export" / MANIFEST).read_text())
    assert manifest["inputs"] != status["inputs"]  # what lies there is the earlier, whole export
    assert (project.run / "promote" / "decision.json").read_bytes() == decision
    assert (project.root / "models" / "shapes" / "champion.json").read_bytes() == champion


def children_of(pid: int) -> list[int]:
    """Every process whose environment or ancestry leads to `pid` (Linux)."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents[int(entry.name)] = int(fields[1])
    found, frontier = [], [pid]
    while frontier:
        frontier = [child for child, parent in parents.items() if parent in frontier]
        found += frontier
    return found


def stopped(project: Project, run_id: str, signum: int, marker: str) -> Path:
    """The folder of a run that got a signal when a line with the marker was printed: it has ended what it started."""
    command = [sys.executable, "-m", "pipelines", "run", "--config", "config.yaml", "--run-id", run_id]
    run = subprocess.Popen(
        [*command, "--set", "train.epochs=1000"],
        cwd=project.folder,
        env=without_settings(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert run.stdout is not None
    for line in run.stdout:
        if marker in line:
            break
    else:
        pytest.fail(f"{marker!r} was never printed")
    started = children_of(run.pid)
    assert len(started) >= 4  # the S3 server, the worker, kfp's executor, the stage
    run.send_signal(signum)
    rest, _ = run.communicate(timeout=60)
    assert run.returncode == 130
    assert "to continue" in rest
    left = [pid for pid in started if Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}").stat()]
    assert not [pid for pid in left if Path(f"/proc/{pid}/cmdline").read_bytes()]
    return project.root / "runs" / run_id


@pytest.mark.long  # its sibling, the signal in the first stage, is part of make test
def test_ctrl_c_stops_everything_that_was_started(project: Project) -> None:
    folder = stopped(project, "stop-training", signal.SIGINT, "epoch 1/1000 done")
    assert json.loads((folder / "status" / "train.json").read_text())["state"] == "preempted"
    assert (folder / "train" / "checkpoints" / "checkpoint.pth").exists()
    assert not (folder / "train" / MANIFEST).exists()


@pytest.mark.slow
def test_so_does_sigterm_in_any_stage(project: Project) -> None:
    """In the first one: what a stage of minutes does then is told by the one above and by test_preemption."""
    folder = stopped(project, "stop-validation", signal.SIGTERM, " validate_dataset INFO ")
    assert not (folder / "status" / "train.json").exists()
