"""Fetches the packages that a bare CUDA image lacks as wheels, and unpacks them there.

    python tests/benchmarks/gpu/wheels.py [--python-version 3.12] [--folder build/gpu-wheels]

fetches, with the versions that deploy/requirements-gpu.txt pins. Which Python runs this does not matter: the wheels are
for CPython of `--python-version` on manylinux x86_64. Runs without an installation of the project.
"""

import argparse
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "build" / "gpu-wheels"
PINS = ROOT / "deploy" / "requirements-gpu.txt"
PYDANTIC = ("pydantic", "pydantic-core")
"""Of exactly matching versions: both are taken from the wheels, or neither is."""
PACKAGES = (*PYDANTIC, "annotated-types", "typing-inspection", "typing-extensions", "fsspec", "liger-kernel", "gguf")
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64", "manylinux1_x86_64")
MOST_BYTES = 50 * 10**6


def fetch(folder: Path, python_version: str) -> list[Path]:
    """Download the wheels of PACKAGES into `folder`, which holds no others afterwards. Raises CalledProcessError."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.whl"):
        old.unlink()
    platforms = [f"--platform={platform}" for platform in PLATFORMS]
    pinned = [f"{name}=={pin}" for name, pin in _pins().items()]
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(folder),
         f"--python-version={python_version}", "--implementation=cp", *platforms, *pinned],
        check=True,
    )  # fmt: skip
    return sorted(folder.glob("*.whl"))


def unpack(folder: Path, site: Path) -> list[str]:
    """Unpack into `site` the wheels that this Python lacks; return the packages that it has neither way."""
    missing = []
    found = {_name(wheel): wheel for wheel in sorted(folder.glob("*.whl")) if _fits(wheel)}
    for name in _wanted():
        if name in found:
            with zipfile.ZipFile(found[name]) as archive:
                archive.extractall(site)
        elif not _is_installed(name):
            missing.append(name)
    return missing


def _wanted() -> Iterator[str]:
    """Packages that are not installed, pydantic and its core together."""
    for name in PACKAGES:
        if not all(map(_is_installed, PYDANTIC if name in PYDANTIC else (name,))):
            yield name


def _is_installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def _fits(wheel: Path) -> bool:
    """Whether this Python can import what the wheel holds."""
    python = wheel.stem.split("-")[-3].split(".")
    return f"cp{sys.version_info.major}{sys.version_info.minor}" in python or "py3" in python


def _name(wheel: Path) -> str:
    return wheel.name.split("-")[0].replace("_", "-").lower()


def _pins() -> dict[str, str]:
    lines = (line.split("==") for line in PINS.read_text().splitlines() if "==" in line)
    pins = {name.strip(): pin.strip() for name, pin in lines}
    return {name: pins[name] for name in PACKAGES}


def main() -> int:
    """Fetch, list what came, and return 1 where it failed or is larger than what may travel."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python-version", default="3.12")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    arguments = parser.parse_args()
    try:
        wheels = fetch(arguments.folder, arguments.python_version)
    except subprocess.CalledProcessError as error:
        print(
            f"error: gpu-wheels: pip: expected exit code 0, got {error.returncode} (see above); this Python needs pip, "
            "and an index that has the versions of deploy/requirements-gpu.txt",
            file=sys.stderr,
        )
        return 1
    size_bytes = sum(wheel.stat().st_size for wheel in wheels)
    for wheel in wheels:
        print(f"{wheel.stat().st_size / 1e6:8.2f} MB  {wheel.name}")
    print(f"{size_bytes / 1e6:8.2f} MB  in {arguments.folder}, at most {MOST_BYTES / 1e6:.0f}")
    return int(size_bytes > MOST_BYTES)


if __name__ == "__main__":
    sys.exit(main())
