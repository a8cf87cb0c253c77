"""`python -m pipelines`: the same as rfdetr-pipeline."""

from pipelines.cli import main

main()
