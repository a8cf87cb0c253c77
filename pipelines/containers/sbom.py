"""A software bill of materials of an image: CycloneDX JSON of what is installed in it."""

from __future__ import annotations

import json
import uuid
from typing import Any
from urllib.parse import quote

# Runs in the image. Python's packages from their metadata, kfp's lies beside (images/Containerfile); Debian's from
# dpkg's own list.
LIST_PACKAGES = """
import importlib.metadata as m, json, pathlib, platform, sys
def licence(meta):
    for name in ("License-Expression", "License"):
        text = (meta.get(name) or "").strip()
        if text and len(text) < 100 and "\\n" not in text:
            return name == "License-Expression", text
    found = [c.rpartition(" :: ")[2] for c in meta.get_all("Classifier") or () if c.startswith("License ::")]
    return False, found[0] if found else ""
rows = []
for d in [*m.distributions(), *m.distributions(path=["/opt/kfp-metadata"])]:
    expression, text = licence(d.metadata)
    rows.append({"name": d.metadata["Name"], "version": d.version, "expression": expression, "licence": text})
debian, entry = [], {}
status = pathlib.Path("/var/lib/dpkg/status")
for line in (status.read_text(errors="replace") if status.exists() else "").split("\\n"):
    key, _, value = line.partition(": ")
    if not line:
        if entry.get("Status", "").endswith(" installed"):
            debian.append({k: entry[k] for k in ("Package", "Version", "Architecture")})
        entry = {}
    elif not line.startswith(" "):
        entry[key] = value
print(json.dumps({"python": rows, "debian": debian, "interpreter": platform.python_version()}))
"""


def cyclonedx(image: str, identity: str, listed: str) -> dict[str, Any]:
    """The document, the same for the same image.

    Args:
        image: its name with a tag.
        identity: its id, a sha256.
        listed: what LIST_PACKAGES printed in it.
    """
    found = json.loads(listed)
    name, _, version = image.rpartition(":")
    components = [_component("python", found["interpreter"], f"pkg:generic/python@{found['interpreter']}")]
    for row in found["python"]:
        purl = f"pkg:pypi/{row['name'].lower().replace('_', '-')}@{quote(row['version'])}"
        component = _component(row["name"], row["version"], purl)
        if row["licence"]:
            text = row["licence"]
            component["licenses"] = [{"expression": text} if row["expression"] else {"license": {"name": text}}]
        components.append(component)
    for row in found["debian"]:
        purl = f"pkg:deb/debian/{row['Package']}@{quote(row['Version'])}?arch={row['Architecture']}"
        components.append(_component(row["Package"], row["Version"], purl))
    unique = {component["bom-ref"]: component for component in components}
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, identity)}",
        "version": 1,
        "metadata": {
            "component": {"type": "container", "bom-ref": identity, "name": name, "version": version},
        },
        "components": [unique[key] for key in sorted(unique)],
    }


def _component(name: str, version: str, purl: str) -> dict[str, Any]:
    return {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl}
