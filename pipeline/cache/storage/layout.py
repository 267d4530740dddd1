"""Paths of a cache's files, and which names may become parts of a path.

cache.json                          the cache's identity: the fields behind the fingerprint
teacher.json                        the teacher's description, and the shard spec
units/index.parquet                 every unit with its file, row group and lengths; written last
units/NNNNN.parquet                 the token sequences, one row group a unit
data/<unit>-<sha16>.parquet         shards, named by the first 16 hex digits of their sha256
commits/<unit>.json                 names the shard of a unit; a shard without a commit is not part of the cache
quarantine/<sequence>.json          why a teacher could not process a sequence
generated/NNNNN-<sha16>.jsonl       a teacher's answers to the corpus' prompts
manifest.json                       all commits in order; derived from them
faithfulness.json                   distances between the cached signals and those of the live teacher
timing.json                         accumulated duration of the captures
lm_head.safetensors, tokenizer/     files that reading and training also need
"""

import re
from typing import cast

from pipeline.contracts import Split
from pipeline.errors import StorageError

CACHE_JSON = "cache.json"
TEACHER_JSON = "teacher.json"
MANIFEST_JSON = "manifest.json"
FAITHFULNESS_JSON = "faithfulness.json"
TIMING_JSON = "timing.json"
LM_HEAD = "lm_head.safetensors"
SIDECARS = (TEACHER_JSON, LM_HEAD)
"""Files that decoding needs and no commit names: the manifest holds the sha256 of each that exists."""
TOKENIZER = "tokenizer"
UNITS = "units"
UNIT_INDEX = "units/index.parquet"
DATA = "data"
COMMITS = "commits"
QUARANTINE = "quarantine"
GENERATED = "generated"

TEMPORARY_PREFIX = ".tmp-"
"""Prefix of the names of files that are being written. Other paths may not have it, and listings leave these out."""

_NAME = re.compile(r"[A-Za-z0-9._-]{1,128}")
_ANSWERS = re.compile(GENERATED + r"/[0-9]{5,}-[0-9a-f]{16}\.jsonl")
_UNIT = re.compile(r"(train|held_out)-[0-9]{5,}")


def check_name(name: str) -> str:
    """Return `name` if it may become a part of a path. Raises StorageError otherwise."""
    if not _NAME.fullmatch(name) or name in (".", ".."):
        raise StorageError(f"name {name[:200]!r}: expected 1..128 of A-Z a-z 0-9 . _ - (and neither . nor ..)")
    return name


def check_path(path: str, *, temporary: bool = False) -> str:
    """Return `path` if every part is a valid name, of a temporary file only if `temporary`. Raises StorageError."""
    for part in path.split("/"):
        if check_name(part).startswith(TEMPORARY_PREFIX) and not temporary:
            raise StorageError(f"name {part!r}: {TEMPORARY_PREFIX}* is reserved for files that are being written")
    return path


def format_unit_id(split: Split, number: int) -> str:
    """Return `train-00000` or `held_out-00000`; sorts by number up to 100,000 units a split."""
    return f"{split}-{number:05d}"


def is_unit(name: str) -> bool:
    """Return whether `name` has the form of a unit id."""
    return _UNIT.fullmatch(name) is not None


def split_of(unit_id: str) -> Split:
    """Return the split in a unit id. Raises StorageError if it is not a unit id."""
    if not is_unit(unit_id):
        raise StorageError(f"unit {unit_id[:200]!r}: expected train-NNNNN or held_out-NNNNN")
    return cast(Split, unit_id.rsplit("-", 1)[0])


def unit_sort_key(unit_id: str) -> tuple[bool, int]:
    """Return the sort key of a unit id: training first, then by number."""
    return split_of(unit_id) == "held_out", int(unit_id.rsplit("-", 1)[1])


def unit_file_path(number: int) -> str:
    """Return the path of file `number` of the unit list."""
    return f"{UNITS}/{number:05d}.parquet"


def shard_path(unit_id: str, sha256: str) -> str:
    """Return the path of a shard. Its name is its content's hash, so attempts with equal content share a file."""
    return f"{DATA}/{check_name(unit_id)}-{sha256[:16]}.parquet"


def commit_path(unit_id: str) -> str:
    """Return the path of a unit's commit."""
    return f"{COMMITS}/{check_name(unit_id)}.json"


def answers_path(number: int, key: str) -> str:
    """Return the path of the answers to prompt batch `number`; `key` is the hex sha256 of what they depend on."""
    return f"{GENERATED}/{number:05d}-{key[:16]}.jsonl"


def is_answers_path(path: str) -> bool:
    """Return whether `path` has the form of an `answers_path`."""
    return _ANSWERS.fullmatch(path) is not None


def quarantine_path(sequence_id: str) -> str:
    """Return the path of a sequence's quarantine record."""
    return f"{QUARANTINE}/{check_name(sequence_id)}.json"
