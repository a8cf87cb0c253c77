"""`python -m pipelines.containers build [--base IMAGE]`, `... push REGISTRY`: what make images and make push run."""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path

from components.images import DIGESTS
from components.stages import CONTAINERS
from pipelines.containers.build import DEFAULT_BASE, ROOT, build_images
from pipelines.containers.push import push_images
from pipelines.containers.tool import container_tool
from rfdetr_core.errors import ExitError


def main() -> int:
    """Entry point: one line for what a user can mend."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.containers", description="Build and push the images.")
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="build the image of every stage")
    build.add_argument("--base", default=DEFAULT_BASE, help=f"image to build on (default: {DEFAULT_BASE})")
    build.add_argument("--stage", action="append", choices=tuple(CONTAINERS), help="only this stage; may be repeated")
    build.add_argument("--out", type=Path, default=ROOT / "build", help="where logs and bills of materials go")
    push = commands.add_parser("push", help="push them to a registry and write images/digests.json")
    push.add_argument("registry", help="such as registry.example.com/team")
    push.add_argument("--digests", type=Path, default=DIGESTS, help=f"the file to write (default: {DIGESTS})")
    arguments = parser.parse_args()
    say = functools.partial(print, flush=True)
    try:
        with container_tool() as tool:
            if arguments.command == "build":
                stages = tuple(arguments.stage or CONTAINERS)
                build_images(tool, base=arguments.base or DEFAULT_BASE, stages=stages, out=arguments.out, say=say)
            else:
                push_images(tool, arguments.registry, path=arguments.digests, say=say)
    except ExitError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
