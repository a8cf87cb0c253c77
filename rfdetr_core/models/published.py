"""The published weight files: name, address and MD5 (model spec 1.3)."""

from __future__ import annotations

from dataclasses import dataclass

_STORE = "https://storage.googleapis.com/rfdetr"


@dataclass(frozen=True, slots=True)
class PublishedFile:
    """A file that upstream publishes under `url`, by the name under which it is asked for."""

    name: str
    url: str
    md5: str


PUBLISHED: dict[str, PublishedFile] = {
    name: PublishedFile(name, f"{_STORE}/{path}", md5)
    for name, path, md5 in (
        ("rf-detr-base.pth", "rf-detr-base-coco.pth", "b4d3ce46099eaed50626ede388caf979"),
        (
            "rf-detr-base-o365.pth",
            "top-secret-1234/lwdetr_dinov2_small_o365_checkpoint.pth",
            "d93f4921ccbb0f0a2e4364bed290892b",
        ),
        ("rf-detr-base-2.pth", "rf-detr-base-2.pth", "462f4d9df407ddc1812f42614040e913"),
        ("rf-detr-large.pth", "rf-detr-large.pth", "992c8e862aa733a7bb2777e45d49f1a0"),
        ("rf-detr-large-2026.pth", "rf-detr-large-2026.pth", "5cb72153541cbcb9aa6efa26222acc75"),
        ("rf-detr-nano.pth", "nano_coco/checkpoint_best_regular.pth", "fb6504cce7fbdc783f7a46991f07639f"),
        ("rf-detr-small.pth", "small_coco/checkpoint_best_regular.pth", "fb37061c1af7bace359c91b723a8d5c1"),
        ("rf-detr-medium.pth", "medium_coco/checkpoint_best_regular.pth", "7223f764a87b863f02eb8d52bf0ce2ee"),
        (
            "rf-detr-keypoint-preview-xlarge.pth",
            "rf-detr-keypoint-preview-xlarge.pth",
            "6de511943ee85a547d4c5cb527daf0eb",
        ),
        ("rf-detr-seg-preview.pt", "rf-detr-seg-preview.pt", "e35820c28fb86080558123e47a5e49ca"),
        ("rf-detr-seg-nano.pt", "rf-detr-seg-n-ft.pth", "9995497791d0ff1664a1d9ddee9cfd20"),
        ("rf-detr-seg-small.pt", "rf-detr-seg-s-ft.pth", "0a2a3006381d0c42853907e700eadd08"),
        ("rf-detr-seg-medium.pt", "rf-detr-seg-m-ft.pth", "a49af1562c3719227ad43d0ca53b4c7a"),
        ("rf-detr-seg-large.pt", "rf-detr-seg-l-ft.pth", "275f7b094909544ed2841c94a677d07e"),
        ("rf-detr-seg-xlarge.pt", "rf-detr-seg-xl-ft.pth", "3693b35d0eea86ebb3e0444f4a611fba"),
        ("rf-detr-seg-xxlarge.pt", "rf-detr-seg-2xl-ft.pth", "040bc3412af840fa8a47e0ff69b552ba"),
    )
}
"""Name -> file. The package carries no weights: a name is fetched when it is asked for."""
