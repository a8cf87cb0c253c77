"""The retraining pipeline as a KFP DAG.

1. validate_dataset   resolve the configuration, check the dataset, publish it in the prepared form
2. probe_batch_size   prove the batch size, or find it
3. train              train the detector, or continue its training
4. evaluate           measure it, and the champion, on the test split
5. export_onnx        export it and prove that ONNX Runtime computes the same
6. promote            register it and, if it is better, make it the champion

Stages exchange nothing through KFP: every task gets the run's URI and reads and writes below it (DESIGN
section 4). Caching is off throughout: a stage knows by itself when its work is done.
"""

from kfp import dsl

from components.evaluate.component import evaluate
from components.export_onnx.component import export_onnx
from components.probe_batch_size.component import probe_batch_size
from components.promote.component import promote
from components.train.component import train
from components.validate_dataset.component import validate_dataset

STAGES = ("validate_dataset", "probe_batch_size", "train", "evaluate", "export_onnx", "promote")


@dsl.pipeline(name="rfdetr-retrain", description="Retrain an RF-DETR detector and promote it if it is better.")
def retrain(root: str, config: str, overrides: dict = {}, run_id: str = ""):  # noqa: B006 (KFP takes no None)
    """Retrain an RF-DETR detector and promote it if it is better.

    Args:
        root: Where everything lies, an S3 prefix such as s3://bucket/detector.
        config: The run's YAML, an s3:// URI.
        overrides: A JSON object merged over the YAML, such as {"train": {"epochs": 50}}.
        run_id: Name of the run; empty for the KFP job id. The same id continues a run.
    """
    run_uri, job_id = f"{root}/runs/{run_id}", dsl.PIPELINE_JOB_ID_PLACEHOLDER
    tasks = [
        validate_dataset(run_uri=run_uri, job_id=job_id, config=config, overrides=overrides),
        probe_batch_size(run_uri=run_uri, job_id=job_id),
        train(run_uri=run_uri, job_id=job_id),
        evaluate(run_uri=run_uri, job_id=job_id),
        export_onnx(run_uri=run_uri, job_id=job_id),
        promote(run_uri=run_uri, job_id=job_id),
    ]
    titles = ("Validate dataset", "Probe batch size", "Train", "Evaluate", "Export ONNX", "Promote")
    for position, (task, title) in enumerate(zip(tasks, titles, strict=True)):
        task.set_display_name(title).set_caching_options(False)
        if position:
            task.after(tasks[position - 1])
