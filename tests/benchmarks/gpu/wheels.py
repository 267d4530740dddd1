"""Downloads the packages that a CUDA image lacks as wheels, and unpacks them there.

    python tests/benchmarks/gpu/wheels.py [--python-version 3.12] [--folder build/gpu-wheels]

downloads the versions that deploy/requirements-gpu.txt pins, for CPython of `--python-version` on manylinux x86_64,
whichever Python runs this. Needs pip, and no installation of the project.
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
"""Each release of one works with one release of the other: both come from wheels, or neither."""
PACKAGES = (*PYDANTIC, "annotated-types", "typing-inspection", "ml-dtypes", "liger-kernel")
"""What the benchmark imports beyond torch, triton, transformers, numpy, pyarrow, pyyaml, numba, pytest and psutil, and
what these require (filelock, fsspec, typing-extensions)."""
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
MAX_BYTES = 50 * 10**6


def fetch(folder: Path, python_version: str) -> list[Path]:
    """Download the wheels of PACKAGES into `folder` and delete other wheels there. Raises CalledProcessError."""
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
    """Unpack the wheels of packages that are not installed into `site`; return the packages without a wheel."""
    missing = []
    found = {_name(wheel): wheel for wheel in sorted(folder.glob("*.whl")) if _is_compatible(wheel)}
    for name in _not_installed():
        if name in found:
            with zipfile.ZipFile(found[name]) as archive:
                archive.extractall(site)
        elif not _is_installed(name):
            missing.append(name)
    return missing


def _not_installed() -> Iterator[str]:
    """Yield the packages that are not installed; both of PYDANTIC if either is not."""
    for name in PACKAGES:
        if not all(map(_is_installed, PYDANTIC if name in PYDANTIC else (name,))):
            yield name


def _is_installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def _is_compatible(wheel: Path) -> bool:
    """Return whether the wheel is for this version of CPython or for any Python 3."""
    tags = wheel.stem.split("-")[-3].split(".")
    return f"cp{sys.version_info.major}{sys.version_info.minor}" in tags or "py3" in tags


def _name(wheel: Path) -> str:
    return wheel.name.split("-")[0].replace("_", "-").lower()


def _pins() -> dict[str, str]:
    lines = (line.split("==") for line in PINS.read_text().splitlines() if "==" in line)
    pins = {name.strip(): pin.strip() for name, pin in lines}
    return {name: pins[name] for name in PACKAGES}


def main() -> int:
    """Download and list the wheels. Return 1 if that failed or they have more than MAX_BYTES."""
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
    print(f"{size_bytes / 1e6:8.2f} MB  in {arguments.folder}, at most {MAX_BYTES / 1e6:.0f}")
    return int(size_bytes > MAX_BYTES)


if __name__ == "__main__":
    sys.exit(main())
