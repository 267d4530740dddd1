"""Validates the manifests of this folder against KubeRay's custom resource definitions.

    python deploy/check_manifests.py FOLDER

FOLDER has the definitions of KubeRay's Helm chart (`crds/*.yaml`). Exit codes: 0 all valid, 1 some invalid, 2 usage.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft7Validator

DEPLOY = Path(__file__).parent


def schemas(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Return the strict schemas by (apiVersion, kind)."""
    by_kind = {}
    for file in sorted(folder.glob("*.yaml")):
        definition = yaml.safe_load(file.read_text())
        spec = definition["spec"]
        for version in spec["versions"]:
            name = f"{spec['group']}/{version['name']}"
            by_kind[name, spec["names"]["kind"]] = strict_schema(version["schema"]["openAPIV3Schema"], top=True)
    return by_kind


def strict_schema(schema: Any, top: bool = False) -> Any:
    """Return the schema with `additionalProperties: false`, as the API server's strict validation applies it."""
    if isinstance(schema, list):
        return [strict_schema(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: strict_schema(value) for key, value in schema.items()}
    if schema.get("x-kubernetes-int-or-string"):
        result.pop("type", None)
        result["type"] = ["integer", "string"]
    keeps_unknown = schema.get("x-kubernetes-preserve-unknown-fields")
    is_metadata = not top and schema.get("type") == "object" and "properties" not in schema
    if isinstance(schema.get("properties"), dict) and not keeps_unknown and not is_metadata:
        result.setdefault("additionalProperties", False)
    return result


def problems(manifest: dict[str, Any], known: dict[tuple[str, str], dict[str, Any]]) -> Iterator[str]:
    """Yield one line for each error in the manifest."""
    key = (manifest.get("apiVersion", ""), manifest.get("kind", ""))
    if key not in known:
        yield f"{key[0]} {key[1]}: no schema for it, expected one of {sorted(known)}"
        return
    for error in Draft7Validator(known[key]).iter_errors(manifest):
        yield f"{'.'.join(map(str, error.absolute_path)) or 'top'}: {error.message[:160]}"


def main(arguments: list[str]) -> int:
    """Validate every manifest and print the errors."""
    if len(arguments) != 1 or not Path(arguments[0]).is_dir():
        print("error: usage: python deploy/check_manifests.py FOLDER_OF_CUSTOM_RESOURCE_DEFINITIONS", file=sys.stderr)
        return 2
    known, invalid = schemas(Path(arguments[0])), 0
    for file in sorted(DEPLOY.glob("ray*.yaml")):
        errors = [line for manifest in yaml.safe_load_all(file.read_text()) for line in problems(manifest, known)]
        print(f"{file.name}: {'valid' if not errors else f'{len(errors)} errors'}")
        for line in errors:
            print(f"  {line}")
        invalid += len(errors)
    return int(invalid > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
