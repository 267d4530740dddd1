"""A small cache: the dummy engine's signals of a few short documents."""

import json
import shutil

import pytest

from actors.engines.dummy import DummyEngine
from pipeline.cache.commit import commit_unit
from pipeline.cache.description import write_teacher
from pipeline.cache.format.schema import ShardSpec
from pipeline.cache.format.shard_writer import encode_shard
from pipeline.cache.lm_head import write_lm_head
from pipeline.cache.manifest import write_manifest
from pipeline.cache.storage import layout
from pipeline.cache.storage.store import Store
from pipeline.cache.unit_list import UnitList
from pipeline.config import recipe_from_dict
from pipeline.contracts import ScoredSequence
from pipeline.corpus.prepare import prepare_cache

FAITHFULNESS = {
    "usable": True,
    "positions": 92,
    "units": ["train-00000"],
    "distances": {"kl_nats": {"live_vs_cache": 1e-4, "live_vs_live": 1e-4, "codec": 1e-4, "allowed": 7e-4}},
    "why": "live against cache 1.00e-04 nats, within 7.00e-04",
}
"""Content of `faithfulness.json` as a capture writes it."""


def build(
    folder,
    *,
    documents=5,
    prefix="doc",
    corpus=None,
    options=None,
    units=None,
    quarantined=(),
    change=lambda rows: rows,
    row_group_per_row=False,
    **capture,
):
    source = folder / "corpus.jsonl"
    rows = [{"id": f"{prefix} {n}", "text": f"Document {n} says: " + "naïve words " * 4} for n in range(documents)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = recipe_from_dict(
        {
            "name": "test",
            "storage": str(folder),
            "corpus": {"source": str(source), "sequence_length": 24, "held_out": 0.25, **(corpus or {})},
            "teachers": [{"name": "dummy", "model": "dummy", "engine": "dummy", "options": options or {}}],
            "capture": {"k": 8, "unit_sequences": 4, **capture},
        }
    )
    prepared = prepare_cache(recipe, recipe.teachers[0])
    engine = DummyEngine(recipe.teachers[0], None, recipe.capture.spec(recipe.seed))
    spec = ShardSpec.of(recipe.capture.spec(recipe.seed), engine.describe())
    write_teacher(prepared.store, engine.describe(), spec)
    write_lm_head(prepared.store, engine.lm_head())
    unit_list = UnitList.open(prepared.store)
    for unit_id in prepared.unit_ids if units is None else units:
        planned = unit_list.read(unit_id).sequences
        kept = [sequence for sequence in planned if sequence.sequence_id not in quarantined]
        scored = change([ScoredSequence(s, g) for s, g in zip(kept, engine.score(kept), strict=True)])
        data = encode_shard(scored, spec, row_group_bytes=1) if row_group_per_row else encode_shard(scored, spec)
        missing = [s.sequence_id for s in planned if s.sequence_id in quarantined]
        commit_unit(prepared.store, unit_id, data, scored, missing)
    write_manifest(prepared.store)
    prepared.store.put(layout.FAITHFULNESS_JSON, json.dumps(FAITHFULNESS).encode())


@pytest.fixture(scope="session")
def built_caches(tmp_path_factory):
    """Folder of caches, and their paths by the arguments of `build`: each is built once and copied for each test."""
    return tmp_path_factory.mktemp("caches"), {}


@pytest.fixture
def make_cache(tmp_path, built_caches):
    """`make_cache(name, **settings)` builds a cache that the test may modify (see `build`) and returns its Store."""
    parent, built = built_caches

    def make(name="run", *, fresh=False, **settings):
        if fresh or "change" in settings:
            (tmp_path / name).mkdir(exist_ok=True)
            build(tmp_path / name, **settings)
        else:
            key = repr(sorted(settings.items()))
            if key not in built:
                built[key] = parent / str(len(built))
                built[key].mkdir()
                build(built[key], **settings)
            shutil.copytree(built[key], tmp_path / name, dirs_exist_ok=True)
        return Store.open(tmp_path / name / "caches" / "dummy")

    return make
