"""What is published: its bytes, its record, and whether it is valid."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pystac
import rasterio

from sattile import stac


def maps_of(out: Path) -> dict[str, str]:
    """Digests of all that is published but the run's own records."""
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file() and not path.name.startswith(("_", "."))
    }


def record_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "_run.json").read_text())


def validate(path: Path, schemas: Path) -> None:
    """A STAC file as it is, against the core schemas that pystac carries and those of the extensions; no network.

    (pystac's own objects are migrated to extension versions whose schemas are not here.)
    """
    from pystac.validation.local_validator import get_local_schema_cache
    from pystac.validation.stac_validator import JsonSchemaSTACValidator

    cache: dict[str, Any] = dict(get_local_schema_cache())
    for schema in schemas.glob("*.json"):
        name, version = schema.stem.rsplit("-", 1)
        # Not by "$id": that of processing 1.1.0 says 1.0.0.
        cache[f"{stac.EXTENSION}/{name}/{version}/schema.json"] = json.loads(schema.read_text())
    projjson = Path(rasterio.__file__).parent / "proj_data" / "projjson.schema.json"
    cache["https://proj.org/schemas/v0.7/projjson.schema.json"] = json.loads(projjson.read_text())
    validator = JsonSchemaSTACValidator()
    validator.schema_cache = cache
    pystac.validation.RegisteredValidator.set_validator(validator)
    pystac.validation.validate_dict(json.loads(path.read_text()), href=str(path))
