import gc

import pytest

from pipeline.run.gc_paused import gc_paused


def test_the_collector_rests_during_an_import_and_works_again_even_if_that_failed():
    with pytest.raises(ImportError), gc_paused():
        assert not gc.isenabled()
        import stillhouse_has_no_such_module  # noqa: F401
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off():
    gc.disable()
    try:
        with gc_paused():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
