"""KFP face of probe_batch_size."""

from kfp import dsl

from components.images import image


@dsl.component(base_image=image("probe_batch_size"), install_kfp_package=False)
def probe_batch_size(run_uri: str, job_id: str):
    """Prove the batch size, or find it, by worst-case training steps."""
    from components.launcher import launch

    launch("probe_batch_size", run_uri, job_id)
