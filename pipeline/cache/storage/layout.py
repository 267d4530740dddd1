"""Where everything lies in a store, and which names may become paths.

cache.json                          whose cache this is: the fields behind the fingerprint
teacher.json                        what the engine found, and the shard spec that follows from it
units/index.parquet                 the plan: every unit, its file, row group and lengths; written last
units/NNNNN.parquet                 the token sequences, one row group a unit
data/<unit>-<sha16>.parquet         shards, named by the first 16 hex digits of their sha256
commits/<unit>.json                 which shard stands for a unit: the only truth
quarantine/<sequence>.json          why a teacher could not process a sequence
generated/NNNNN-<sha16>.jsonl       what a teacher wrote to the corpus' prompts, where it was asked to
manifest.json                       all commits in order, derived
faithfulness.json                   how far the cache is from the live teacher, as the capture has measured it
timing.json                         how long the captures took, added up
lm_head.safetensors, tokenizer/     what reading and training also need
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
"""What gives the shards their meaning and no commit names: the manifest keeps the sha256 of each that is there."""
TOKENIZER = "tokenizer"
UNITS = "units"
UNIT_INDEX = "units/index.parquet"
DATA = "data"
COMMITS = "commits"
QUARANTINE = "quarantine"
GENERATED = "generated"

TEMPORARY_PREFIX = ".tmp-"
"""Begins the name of a file that is being written. No path that is asked for may, and no listing shows one."""

_NAME = re.compile(r"[A-Za-z0-9._-]{1,128}")
_ANSWERS = re.compile(GENERATED + r"/[0-9]{5,}-[0-9a-f]{16}\.jsonl")
_UNIT = re.compile(r"(train|held_out)-[0-9]{5,}")


def check_name(name: str) -> str:
    """`name` itself, if it may become a part of a path; StorageError otherwise."""
    if not _NAME.fullmatch(name) or name in (".", ".."):
        raise StorageError(f"name {name[:200]!r}: expected 1..128 of A-Z a-z 0-9 . _ - (and neither . nor ..)")
    return name


def check_path(path: str, *, unfinished: bool = False) -> str:
    """`path` itself, if every part between its slashes is a name, none of an unfinished file unless that is allowed."""
    for part in path.split("/"):
        if check_name(part).startswith(TEMPORARY_PREFIX) and not unfinished:
            raise StorageError(f"name {part!r}: {TEMPORARY_PREFIX}* is kept for files that are being written")
    return path


def unit_name(split: Split, number: int) -> str:
    """`train-00000`, `held_out-00000`: sorts by number up to 100,000 units a split."""
    return f"{split}-{number:05d}"


def is_unit(name: str) -> bool:
    """Whether it is a unit's id."""
    return _UNIT.fullmatch(name) is not None


def split_of(unit_id: str) -> Split:
    """The split that a unit's id says; StorageError where it is no unit's id."""
    if not is_unit(unit_id):
        raise StorageError(f"unit {unit_id[:200]!r}: expected train-NNNNN or held_out-NNNNN")
    return cast(Split, unit_id.rsplit("-", 1)[0])


def unit_order(unit_id: str) -> tuple[bool, int]:
    """Sort key of unit ids: training first, then by number."""
    return split_of(unit_id) == "held_out", int(unit_id.rsplit("-", 1)[1])


def unit_file_path(number: int) -> str:
    """The number-th file of the unit list."""
    return f"{UNITS}/{number:05d}.parquet"


def shard_path(unit_id: str, sha256: str) -> str:
    """A shard is named by its content, so equal attempts share a file and the name says nothing of who wrote it."""
    return f"{DATA}/{check_name(unit_id)}-{sha256[:16]}.parquet"


def commit_path(unit_id: str) -> str:
    """The one file that decides which shard stands for a unit."""
    return f"{COMMITS}/{check_name(unit_id)}.json"


def answers_path(number: int, key: str) -> str:
    """The answers to the number-th batch of prompts; `key` is the hex sha256 of what they depend on."""
    return f"{GENERATED}/{number:05d}-{key[:16]}.jsonl"


def is_answers(path: str) -> bool:
    """Whether it is an `answers_path`."""
    return _ANSWERS.fullmatch(path) is not None


def quarantine_path(sequence_id: str) -> str:
    """Why a sequence could not be processed."""
    return f"{QUARANTINE}/{check_name(sequence_id)}.json"
