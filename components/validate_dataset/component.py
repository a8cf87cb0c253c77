"""KFP face of validate_dataset."""

from kfp import dsl

from components.images import image


@dsl.component(base_image=image("validate_dataset"), install_kfp_package=False)
def validate_dataset(
    run_uri: str, job_id: str, config: str, overrides: dict, report: dsl.Output[dsl.HTML], gpu_count: str = ""
):
    """Resolve the configuration, check the dataset and publish it in the prepared form."""
    from components.launcher import copy_file, launch

    run = launch("validate_dataset", run_uri, job_id, config=config, overrides=overrides, gpu_count=gpu_count)
    copy_file(run, "dataset/report.html", report.path)
