"""`python -m pipelines.containers build [--base IMAGE]`, `... push REGISTRY`: what make images and make push run."""

from __future__ import annotations

import argparse
import sys

from components.images import STAGES
from pipelines.containers.build import DEFAULT_BASE, build_images
from pipelines.containers.push import push_images
from pipelines.containers.tool import container_tool
from rfdetr_core.errors import ExitError


def main() -> int:
    """Entry point: one line for what a user can mend."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.containers", description="Build and push the images.")
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="build the image of every stage")
    build.add_argument("--base", default=DEFAULT_BASE, help=f"image to build on (default: {DEFAULT_BASE})")
    build.add_argument("--stage", action="append", choices=STAGES, help="only this stage; may be repeated")
    push = commands.add_parser("push", help="push them to a registry and write images/digests.json")
    push.add_argument("registry", help="such as registry.example.com/team")
    arguments = parser.parse_args()
    try:
        with container_tool() as tool:
            if arguments.command == "build":
                build_images(tool, base=arguments.base or DEFAULT_BASE, stages=tuple(arguments.stage or STAGES))
            else:
                push_images(tool, arguments.registry)
    except ExitError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
