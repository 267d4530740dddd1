"""A whole cache in a second: the dummy teacher's signals of a few short documents."""

import json

import pytest

from actors.engines.dummy import DummyEngine
from pipeline.cache.commit import commit_unit
from pipeline.cache.description import write_teacher
from pipeline.cache.lm_head import write_lm_head
from pipeline.cache.manifest import write_manifest
from pipeline.cache.schema import ShardSpec
from pipeline.cache.units import UnitList
from pipeline.cache.writer import encode_shard
from pipeline.config import recipe_from
from pipeline.contracts import ScoredSequence
from pipeline.prepare import prepare_cache


@pytest.fixture
def make_cache(tmp_path):
    """`make_cache(name, documents=..., k=..., units=None, quarantined=(), **capture)` -> the cache's Store."""

    def make(
        name="run",
        *,
        documents=8,
        corpus=None,
        teacher=None,
        units=None,
        quarantined=(),
        change=None,
        rows_apart=False,
        **capture,
    ):
        source = tmp_path / f"{name}.jsonl"
        rows = [{"id": f"doc {n}", "text": f"Document {n} says: " + "naïve words " * 4} for n in range(documents)]
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        recipe = recipe_from(
            {
                "name": "test",
                "storage": str(tmp_path / name),
                "corpus": {"source": str(source), "sequence_length": 24, "held_out": 0.25, **(corpus or {})},
                "teachers": [
                    {"name": "dummy", "model": "dummy", "engine": "dummy"} | (teacher or {}),
                ],
                "capture": {"k": 8, "unit_sequences": 4, **capture},
            }
        )
        prepared = prepare_cache(recipe, recipe.teachers[0])
        engine = DummyEngine(recipe.teachers[0], None, recipe.capture.spec(recipe.seed))
        spec = ShardSpec.of(recipe.capture.spec(recipe.seed), engine.describe())
        write_teacher(prepared.store, engine.describe(), spec)
        write_lm_head(prepared.store, engine.lm_head())
        plan = UnitList.open(prepared.store)
        for unit_id in prepared.unit_ids if units is None else units:
            whole = plan.read(unit_id).sequences
            kept = [sequence for sequence in whole if sequence.sequence_id not in quarantined]
            scored = [ScoredSequence(s, g) for s, g in zip(kept, engine.score(kept), strict=True)]
            scored = scored if change is None else change(scored)
            missing = [s.sequence_id for s in whole if s.sequence_id in quarantined]
            data = encode_shard(scored, spec, row_group_bytes=1) if rows_apart else encode_shard(scored, spec)
            commit_unit(prepared.store, unit_id, data, scored, missing)
        write_manifest(prepared.store)
        return prepared.store

    return make
