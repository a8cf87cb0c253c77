"""KFP face of evaluate."""

from kfp import dsl

from components.images import image


@dsl.component(base_image=image("evaluate"), install_kfp_package=False)
def evaluate(
    run_uri: str,
    job_id: str,
    metrics: dsl.Output[dsl.Metrics],
    confusion: dsl.Output[dsl.ClassificationMetrics],
    report: dsl.Output[dsl.HTML],
):
    """Evaluate the trained weights and the champion on the test split."""
    from components.launcher import copy_file, launch, read_json
    from rfdetr_core.evaluation.analysis import condensed

    run = launch("evaluate", run_uri, job_id)
    found = read_json(run, "evaluate/metrics.json")
    for role in ("candidate", "champion"):
        for name in ("map", "map50", "map75", "mar", "f1"):
            if found[role] is not None:
                metrics.log_metric(f"{role}_{name}", found[role][name])
    if found["comparison"] is not None:
        for name, value in found["comparison"]["metrics"]["map"].items():
            if value is not None and name not in ("candidate", "champion"):
                metrics.log_metric(f"map_{name}", value)
    names, counts = condensed(read_json(run, "evaluate/confusion.json"), 40)
    confusion.log_confusion_matrix(names, counts)
    copy_file(run, "evaluate/report.html", report.path)
