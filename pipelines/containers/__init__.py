"""Stages in real containers: build their images, push them, and run the DAG in them on this machine.

`tool.py` finds docker, podman or buildah; `build.py` builds every target of images/Containerfile and checks sizes;
`sbom.py` lists what is in an image; `push.py` writes images/digests.json; `engine.py` and `runner.py` run a stage.
Only the last two need more than Python: `make images` works without the virtual environment.
"""
