"""The retraining pipeline as a KFP DAG.

1. validate_dataset   resolve the configuration, check the dataset, publish it in the prepared form
2. probe_batch_size   prove the batch size, or find it
3. train              train the detector, or continue its training
4. evaluate           measure it, and the champion, on the test split
5. export_onnx        export it and prove that ONNX Runtime computes the same
6. promote            register it and, if it is better, make it the champion
   notify             tell how it ended, whichever way (exit handler)

Stages exchange nothing through KFP: every task gets the run's URI and reads and writes below it (DESIGN
section 4). Caching is off throughout: a stage knows by itself when its work is done.
"""

from collections.abc import Mapping
from typing import Any

from kfp import dsl

from components.evaluate.component import evaluate
from components.export_onnx.component import export_onnx
from components.images import built_images
from components.notify.component import notify
from components.probe_batch_size.component import probe_batch_size
from components.promote.component import promote
from components.stages import DAG, NOTIFY, StageFacts
from components.train.component import train
from components.validate_dataset.component import validate_dataset
from pipelines.platform import Profile, apply

DESCRIPTION = "Retrain an RF-DETR detector and promote it if it is better."
_INPUTS = """
    Args:
        root: Where everything lies, an S3 prefix such as s3://bucket/detector.
        config: The run's YAML, an s3:// URI.
        overrides: A JSON object merged over the YAML, such as {"train": {"epochs": 50}}.
        run_id: Name of the run; empty for the KFP job id. The same id continues a run."""
_GPU_INPUTS = """
        gpu_type: What nodes call the GPUs, for all stages that compute on one.
        gpu_count: GPUs of the pod that trains; train.devices follows it."""


def pipeline(profile: Profile | None = None, images: Mapping[str, str] | None = None) -> Any:
    """The DAG; for a cluster with what its profile says, without one as it runs on this machine.

    Args:
        images: stage → image, as `pinned_images` gives them; by default those that `make images` builds.
    """

    def retrain(root: str, config: str, overrides: dict = {}, run_id: str = ""):  # noqa: B006 (KFP takes no None)
        _dag(profile, images or built_images(), root, config, overrides, run_id)

    # gpu_count is text: KFP's driver reads what a pod's resources are made of as text only, and finds "" in a number.
    def retrain_on_gpus(
        root: str,
        config: str,
        overrides: dict = {},  # noqa: B006
        run_id: str = "",
        gpu_type: str = "",
        gpu_count: str = "",
    ):
        _dag(profile, images or built_images(), root, config, overrides, run_id, gpu_type, gpu_count)

    function: Any = retrain
    function.__doc__ = f"{DESCRIPTION}\n{_INPUTS}\n"
    if profile is not None and profile.gpu is not None:
        function = retrain_on_gpus
        function.__doc__ = f"{DESCRIPTION}\n{_INPUTS}{_GPU_INPUTS}\n"
        function.__defaults__ = ({}, "", profile.gpu.type, str(profile.stage("train").gpus))
    return dsl.pipeline(name="rfdetr-retrain", display_name="RF-DETR retraining", description=DESCRIPTION)(function)


def _dag(
    profile: Profile | None,
    images: Mapping[str, str],
    root: str,
    config: str,
    overrides: dict,
    run_id: str,
    gpu_type: Any = None,
    gpu_count: Any = None,
) -> None:
    run_uri, job_id = f"{root}/runs/{run_id}", dsl.PIPELINE_JOB_ID_PLACEHOLDER
    resolving = {"config": config, "overrides": overrides}
    devices = {} if gpu_count is None else {"gpu_count": gpu_count}

    def settle(task: Any, facts: StageFacts) -> Any:
        task.set_display_name(facts.title).set_caching_options(False)
        if profile is not None:
            task.set_container_image(images[facts.name])
            apply(profile, facts, task, images[facts.name], gpu_type=gpu_type, gpu_count=gpu_count)
        return task

    last = settle(notify(run_uri=run_uri, job_id=job_id, **resolving), NOTIFY)
    with dsl.ExitHandler(last, name="retrain"):
        tasks = [
            validate_dataset(run_uri=run_uri, job_id=job_id, **resolving, **devices),
            probe_batch_size(run_uri=run_uri, job_id=job_id),
            train(run_uri=run_uri, job_id=job_id),
            evaluate(run_uri=run_uri, job_id=job_id),
            export_onnx(run_uri=run_uri, job_id=job_id),
            promote(run_uri=run_uri, job_id=job_id),
        ]
        for position, (task, facts) in enumerate(zip(tasks, DAG, strict=True)):
            settle(task, facts)
            if position:
                task.after(tasks[position - 1])
