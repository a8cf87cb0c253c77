"""KFP face of promote."""

from kfp import dsl

from components.images import image


@dsl.component(base_image=image("promote"), install_kfp_package=False)
def promote(run_uri: str, job_id: str, decision: dsl.Output[dsl.Metrics]):
    """Decide whether the trained model becomes the champion."""
    from components.launcher import launch, read_json

    run = launch("promote", run_uri, job_id)
    for name, value in read_json(run, "promote/decision.json").items():
        if value is not None and name != "checks":
            decision.metadata[name] = value
