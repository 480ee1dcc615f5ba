"""`kustomize build`: by the real one where there is one, and by hand for what these overlays use of it."""

from __future__ import annotations

import copy
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml")

Resource = dict[str, Any]


def command() -> list[str] | None:
    """What builds a kustomization here, if anything does."""
    if shutil.which("kustomize"):
        return ["kustomize", "build"]
    return ["kubectl", "kustomize"] if shutil.which("kubectl") else None


def built_by_kustomize(folder: Path) -> list[Resource]:
    """The resources, as the real kustomize resolves them."""
    known = command()
    assert known is not None
    done = subprocess.run([*known, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return documents(done.stdout)


def documents(text: str) -> list[Resource]:
    """YAML documents that are not empty."""
    return [document for document in yaml.safe_load_all(text) if document is not None]


def built(folder: Path) -> list[Resource]:
    """The resources, with components, namespace, images and JSON patches resolved; anything else is refused."""
    content = yaml.safe_load((folder / "kustomization.yaml").read_text())
    unknown = set(content) - {"apiVersion", "kind", "resources", "components", "namespace", "images", "patches"}
    assert not unknown, unknown
    resources = [found for name in content.get("resources", ()) for found in _resource(folder / name)]
    resources += [found for name in content.get("components", ()) for found in built(folder / name)]
    for patch in content.get("patches", ()):
        _patch(resources, patch["target"], yaml.safe_load(patch["patch"]))
    for image in content.get("images", ()):
        _set_image(resources, image)
    for resource in resources if "namespace" in content else ():
        if resource["kind"] != "Namespace":
            resource["metadata"]["namespace"] = content["namespace"]
    return resources


def _resource(path: Path) -> list[Resource]:
    return built(path) if path.is_dir() else documents(path.read_text())


def _patch(resources: list[Resource], target: dict[str, str], operations: list[dict[str, Any]]) -> None:
    chosen = [resource for resource in resources if resource["kind"] == target["kind"]]
    assert chosen, target
    for resource in chosen:
        for operation in operations:
            *path, last = operation["path"].strip("/").split("/")
            parent: Any = resource
            for part in path:
                parent = parent[part]
            if last == "-":
                assert operation["op"] == "add"
                parent.append(copy.deepcopy(operation["value"]))
            else:
                assert last in parent, operation
                parent[last] = operation["value"]


def _set_image(value: Any, image: dict[str, str]) -> None:
    """In every list of containers, wherever it is."""
    if isinstance(value, dict):
        for name, inner in value.items():
            for container in inner if name in ("containers", "initContainers") else ():
                if container["image"] == image["name"]:
                    pin = f"@{image['digest']}" if "digest" in image else f":{image['newTag']}"
                    container["image"] = f"{image['newName']}{pin}"
            _set_image(inner, image)
    elif isinstance(value, list):
        for inner in value:
            _set_image(inner, image)
