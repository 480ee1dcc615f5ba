"""What spach-package writes is never written over what came since it began, whichever kind it is."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from spach_deploy.bundle import store as bundles
from spach_deploy.common.errors import BundleError
from spach_deploy.common.files import Destination
from spach_deploy.packaging.kubernetes.deployment import KubernetesOptions
from spach_deploy.packaging.triton.options import Backend, TritonOptions
from spach_deploy.packaging.triton.served_model import BundleArgument
from tests.packaging.triton import tiny_bundles

WRITERS: dict[str, Callable[..., object]] = {
    "triton.repository": lambda m, bundle, target, **how: m.write_repository(
        [BundleArgument.parse(str(bundle))], target, TritonOptions(), **how
    ),
    "kubernetes.folder": lambda m, bundle, target, **how: m.write_folder(
        bundle, target, KubernetesOptions(backend=Backend.ONNXRUNTIME), **how
    ),
    "cpp.folder": lambda m, bundle, target, **how: m.write_folder(bundle, target, **how),
    "onnxruntime.folder": lambda m, bundle, target, **how: m.write_folder(bundle, target, **how),
    "polygraphy.folder": lambda m, bundle, target, **how: m.write_folder(bundle, target, **how),
}


@pytest.mark.parametrize("is_replacing", [False, True])
@pytest.mark.parametrize("kind", WRITERS)
def test_what_came_since_is_left_alone(
    kind: str, is_replacing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module(f"spach_deploy.packaging.{kind}")
    bundle, target = tiny_bundles.write(tmp_path / "bundle"), tmp_path / "package"
    if is_replacing:
        WRITERS[kind](module, bundle, target)

    @contextlib.contextmanager
    def writing(place: Destination) -> Iterator[Path]:
        with bundles.writing(place) as staging:
            yield staging
            if place.path == target:
                target.rename(tmp_path / "aside") if is_replacing else None
                target.mkdir()
                (target / "another's").touch()

    monkeypatch.setattr(module, "writing", writing)
    with pytest.raises(BundleError, match="since this command began"):
        WRITERS[kind](module, bundle, target, overwrite=is_replacing)
    assert [file.name for file in target.iterdir()] == ["another's"]
