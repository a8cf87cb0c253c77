"""KFP face of train."""

from kfp import dsl

from components.images import image


@dsl.component(base_image=image("train"), install_kfp_package=False)
def train(run_uri: str, job_id: str, training: dsl.Output[dsl.Metrics]):
    """Train the detector, or continue its training."""
    from components.launcher import launch, read_json

    run = launch("train", run_uri, job_id)
    for name, value in read_json(run, "train/result.json").items():
        if value is not None:
            training.metadata[name] = value
