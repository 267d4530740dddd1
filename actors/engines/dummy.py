"""An engine without a model, for tests and dry runs: a random bigram model with optional injected faults.

Signals are a pure function of (seed, token ids). All weights are multiples of 1/8, so that every logit is exact in
float32: bytes are equal on any machine, and LM head times exact hidden state gives the logits without rounding.

Options (`options` of the recipe's teacher), besides `vocabulary`, `width`, `layers`, `max_tokens` and `seed`:

    delay_s_per_token   seconds to sleep for each token
    startup_s           seconds to sleep before the engine is ready
    openings            path of a log file: each engine that opens appends its process id
    dead_openings       the first n engines of that log raise EngineDead
    <fault>_on          comma-separated sequence ids; a call with one of them has the fault
    <fault>_every       every n-th call of `score` has the fault

where a fault is one of `row_error` (RowError), `error` (EngineError without a row), `dead` (EngineDead), `kill`
(SIGKILL to this process) and `hang` (sleeps for `hang_s`, by default an hour).
"""

import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from actors.engines.checks import check_capture, check_rows
from actors.signals.reference import reference_signals
from pipeline.bfloat16 import to_bfloat16
from pipeline.config.capture import TeacherSpec
from pipeline.contracts import CaptureSpec, LmHead, Signals, TeacherDescription, TokenSequence
from pipeline.errors import EngineDead, EngineError, RecipeError, RowError
from pipeline.models.folders import ModelFolder

FAULTS = ("row_error", "error", "dead", "kill", "hang")
_SIZES = {"vocabulary", "width", "layers", "max_tokens", "seed"}
_OPTIONS = _SIZES | {"delay_s_per_token", "startup_s", "hang_s", "openings", "dead_openings"}
_KNOWN = _OPTIONS | {f"{fault}_{trigger}" for fault in FAULTS for trigger in ("on", "every")}


class Faults:
    """Delays and injected faults of a dummy engine or generator, from the teacher's `options`."""

    def __init__(self, options: Mapping[str, float | int | str | bool]) -> None:
        self._options = options
        self._calls = 0

    def open(self) -> None:
        """Sleep for `startup_s`. Raises EngineDead for the first `dead_openings`."""
        if "openings" in self._options:
            self._count_opening(Path(str(self._options["openings"])))
        time.sleep(float(self._options.get("startup_s", 0.0)))

    def inject(self, sequence_ids: Sequence[str]) -> None:
        """Count the call and inject its faults: RowError, EngineError, EngineDead, SIGKILL, or a long sleep."""
        self._calls += 1
        for fault in FAULTS:
            listed = str(self._options.get(f"{fault}_on", "")).split(",")
            matched = next((i for i in sequence_ids if i in listed), None)
            every = int(self._options.get(f"{fault}_every", 0))
            if matched is not None or (every and self._calls % every == 0):
                self._raise_fault(fault, matched or sequence_ids[0])

    def delay(self, tokens: int) -> None:
        """Sleep for `delay_s_per_token` times the number of tokens."""
        time.sleep(tokens * float(self._options.get("delay_s_per_token", 0.0)))

    def _count_opening(self, file: Path) -> None:
        with file.open("a+") as log:
            log.write(f"{os.getpid()}\n")
            log.seek(0)
            opening = len(log.readlines())
        if opening <= int(self._options.get("dead_openings", 0)):
            raise EngineDead(f"injected fault: engine died at opening {opening}")

    def _raise_fault(self, fault: str, sequence_id: str) -> None:
        if fault == "row_error":
            raise RowError(sequence_id, "injected fault: row refused")
        if fault == "error":
            raise EngineError("injected fault: error")
        if fault == "dead":
            raise EngineDead("injected fault: engine died")
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(float(self._options.get("hang_s", 3600.0)))


class DummyEngine:
    """The bigram model (see the module). Raises RecipeError for an unknown option."""

    def __init__(self, teacher: TeacherSpec, model: ModelFolder | None, spec: CaptureSpec) -> None:
        for name in teacher.options:
            if name not in _KNOWN:
                raise RecipeError(
                    f"teacher {teacher.name} options: expected one of {', '.join(sorted(_KNOWN))}, got {name}"
                )
        self._options = teacher.options
        self._spec = spec
        self._faults = Faults(teacher.options)
        config = {} if model is None else model.config
        self._description = TeacherDescription(
            name=teacher.name,
            architecture="Dummy",
            vocabulary=int(self._options.get("vocabulary", config.get("vocab_size", 512))),
            layers=int(self._options.get("layers", config.get("num_hidden_layers", 4))),
            hidden_width=int(self._options.get("width", config.get("hidden_size", 32))),
            dtype="bfloat16",
            engine="dummy",
            engine_version="1",
        )
        check_capture(spec, self._description)
        self._embedding_VD, self._head_VD = self._weights()
        self._faults.open()

    def describe(self) -> TeacherDescription:
        """Return the description, from the recipe's options and the model's config."""
        return self._description

    def score(self, sequences: Sequence[TokenSequence]) -> list[Signals]:
        """Return the signals of every sequence. Injects faults first."""
        self._faults.inject([sequence.sequence_id for sequence in sequences])
        max_tokens = self._options.get("max_tokens")
        check_rows(sequences, self._description.vocabulary, None if max_tokens is None else int(max_tokens))
        self._faults.delay(sum(len(sequence.input_ids_N) for sequence in sequences))
        return [self._score(sequence) for sequence in sequences]

    def lm_head(self) -> LmHead:
        """Return the head: its product with `exact_hidden_TD` is this teacher's logits, without rounding."""
        return LmHead(weight_VD=to_bfloat16(self._head_VD))

    def close(self) -> None:
        """Do nothing: there are no resources to release."""

    def _weights(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        generator = np.random.Generator(np.random.Philox(key=int(self._options.get("seed", 0))))
        shape = (2, self._description.vocabulary, self._description.hidden_width)
        eighths = generator.integers(-8, 9, size=shape, dtype=np.int8)
        embedding_VD, head_VD = eighths.astype(np.float32) / 8
        return embedding_VD, head_VD

    def _score(self, sequence: TokenSequence) -> Signals:
        ids = sequence.input_ids_N
        state_TD = self._state(ids[:-1])
        boundary_V = np.arange(self._description.vocabulary) % 4 == 0 if self._spec.boundary else None
        logits_TV = state_TD @ self._head_VD.T
        signals = reference_signals(logits_TV, ids[1:], self._spec, sequence.sequence_id, boundary_V)
        layers = [state_TD if i == -1 else np.roll(state_TD, i + 1, axis=1) for i in self._spec.hidden_layers]
        return replace(
            signals,
            hidden_TLD=to_bfloat16(np.stack(layers, axis=1)) if layers else None,
            exact_hidden_TD=to_bfloat16(state_TD) if sequence.audited else None,
        )

    def _state(self, ids_T: NDArray[np.int32]) -> NDArray[np.float32]:
        """Return each token's embedding plus half of the previous one: multiples of 1/16, exact in bfloat16."""
        current_TD = self._embedding_VD[ids_T]
        previous_TD = np.zeros_like(current_TD)
        previous_TD[1:] = current_TD[:-1]
        return current_TD + np.float32(0.5) * previous_TD
