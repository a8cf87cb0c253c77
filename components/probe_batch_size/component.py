"""KFP face of probe_batch_size."""

from kfp import dsl

from components.images import image


@dsl.component(base_image=image("probe_batch_size"), install_kfp_package=False)
def probe_batch_size(run_uri: str, job_id: str, probe: dsl.Output[dsl.Metrics], report: dsl.Output[dsl.HTML]):
    """Prove the batch size, or find it, by worst-case training steps; estimate what the training costs."""
    from components.launcher import copy_file, launch, read_json

    run = launch("probe_batch_size", run_uri, job_id)
    found = read_json(run, "probe/probe.json")
    for name in ("batch_size", "grad_accum_steps"):
        probe.log_metric(name, found[name])
    for name in ("hours", "device_hours", "price"):
        if found["cost"][name] is not None:
            probe.log_metric(name, found["cost"][name])
    copy_file(run, "probe/report.html", report.path)
