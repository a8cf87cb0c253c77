"""KFP face of notify."""

from kfp import dsl

from components.images import image


@dsl.component(base_image=image("notify"), install_kfp_package=False)
def notify(
    status: dsl.PipelineTaskFinalStatus,
    run_uri: str,
    job_id: str,
    config: str,
    overrides: dict,
    summary: dsl.Output[dsl.Markdown],
):
    """Tell how the run ended; never fails it."""
    from components.launcher import launch_notify

    launch_notify(run_uri, job_id, config, overrides, status.state, status.error_message or "", summary.path)
