"""KFP face of export_onnx."""

from kfp import dsl

from components.images import image


@dsl.component(base_image=image("export_onnx"), install_kfp_package=False)
def export_onnx(run_uri: str, job_id: str):
    """Export to ONNX and prove that ONNX Runtime computes the same."""
    from components.launcher import launch

    launch("export_onnx", run_uri, job_id)
