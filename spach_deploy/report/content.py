"""What a page is made from, read with care: a manifest may be another version's, or lack a section."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

Json = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class ReportContent:
    """report.json, the bundle's manifest (empty where there is none), and pictures as data URIs by image index.

    `made`: when the page is made, ISO 8601; a report has no time in it.
    """

    report: Json
    manifest: Json = dataclasses.field(default_factory=dict)
    pictures: Mapping[int, str] = dataclasses.field(default_factory=dict)
    made: str = ""

    def section(self, *names: str) -> Json:
        """A section of the manifest, such as `section("engine", "kernels")`; empty where it has none."""
        found: Any = self.manifest
        for name in names:
            found = found.get(name) if isinstance(found, Mapping) else None
        return found if isinstance(found, Mapping) else {}

    @property
    def evidence(self) -> list[Json]:
        """All runs, the most telling first."""
        return list(self.report.get("evidence") or ())

    @property
    def first(self) -> Json:
        """The run that decides; empty where nothing ran."""
        return self.evidence[0] if self.evidence else {}

    @property
    def logits(self) -> Json:
        """How the first run's logits compare; empty where they could not be compared."""
        outputs = self.first.get("comparison", {}).get("outputs", ())
        return next((output for output in outputs if output["name"] == "logits"), {})

    @property
    def bounds(self) -> Json:
        """What the first run's logits may differ by."""
        outputs: Json = self.first.get("tolerances", {}).get("outputs", {})
        found: Json = outputs.get("logits", {})
        return found
