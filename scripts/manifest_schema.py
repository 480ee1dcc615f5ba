#!/usr/bin/env python3
"""Writes docs/manifest.schema.json, the JSON Schema of manifest.json, from the classes that read and write it.

.venv/bin/python scripts/manifest_schema.py
"""

from __future__ import annotations

import json
from pathlib import Path

from spach_deploy.bundle.schema import json_schema

FILE = Path(__file__).resolve().parents[1] / "docs" / "manifest.schema.json"

if __name__ == "__main__":
    FILE.write_text(json.dumps(json_schema(), indent=2) + "\n", encoding="utf-8")
