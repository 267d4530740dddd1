"""A teacher without a model: its signals are a pure function of (seed, token ids), its faults happen on command.

It is a bigram model with small random weights. All of them are small multiples of 1/8, so that every logit is exact in
float32: the same bytes come out on any machine, and the LM head times the exact hidden state is the distribution.

Settings (`options` of the recipe's teacher), besides `vocabulary`, `width`, `layers`, `max_tokens` and `seed`:

    delay_s_per_token   sleep that long for each token
    startup_s           sleep that long before the engine is ready
    openings            a file to which every opening adds its process id
    dead_openings       how many of these end in EngineDead, counted from the first
    <fault>_on          sequence ids, separated by commas, that bring the fault about
    <fault>_every       the fault strikes on every n-th call of `score`

where a fault is one of `row_error` (RowError), `error` (EngineError, no row named), `dead` (EngineDead), `kill`
(SIGKILL to this process) and `hang` (sleeps for `hang_s`, an hour if unset).
"""

import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from actors.engines.checks import check_capture, check_rows
from actors.signals.reference import reference_signals
from pipeline.config.capture import TeacherSpec
from pipeline.contracts import Bf16Array, CaptureSpec, LmHead, Signals, TeacherDescription, TokenSequence
from pipeline.errors import EngineDead, EngineError, RecipeError, RowError

if TYPE_CHECKING:
    from pipeline.models.folders import ModelFolder

FAULTS = ("row_error", "error", "dead", "kill", "hang")
_SIZES = {"vocabulary", "width", "layers", "max_tokens", "seed"}
_SETTINGS = _SIZES | {"delay_s_per_token", "startup_s", "hang_s", "openings", "dead_openings"}
_KNOWN = _SETTINGS | {f"{fault}_{when}" for fault in FAULTS for when in ("on", "every")}


class Faults:
    """What a dummy is told to do besides its work, in whichever of its trades."""

    def __init__(self, options: Mapping[str, float | int | str | bool]) -> None:
        self._options = options
        self._calls = 0

    def open(self) -> None:
        """Take as long to open as told. Raises EngineDead."""
        if "openings" in self._options:
            self._count_opening(Path(str(self._options["openings"])))
        time.sleep(float(self._options.get("startup_s", 0.0)))

    def strike(self, sequence_ids: Sequence[str]) -> None:
        """Bring about what is due at this call: RowError, EngineError, EngineDead, SIGKILL, or a long sleep."""
        self._calls += 1
        for fault in FAULTS:
            listed = str(self._options.get(f"{fault}_on", "")).split(",")
            struck = next((i for i in sequence_ids if i in listed), None)
            every = int(self._options.get(f"{fault}_every", 0))
            if struck is not None or (every and self._calls % every == 0):
                self._bring_about(fault, struck or sequence_ids[0])

    def work(self, tokens: int) -> None:
        """Take as long for so many tokens as told."""
        time.sleep(tokens * float(self._options.get("delay_s_per_token", 0.0)))

    def _count_opening(self, file: Path) -> None:
        with file.open("a+") as log:
            log.write(f"{os.getpid()}\n")
            log.seek(0)
            opening = len(log.readlines())
        if opening <= int(self._options.get("dead_openings", 0)):
            raise EngineDead(f"the dummy engine was told to die at opening {opening}")

    def _bring_about(self, fault: str, sequence_id: str) -> None:
        if fault == "row_error":
            raise RowError(sequence_id, "the dummy engine was told to refuse this row")
        if fault == "error":
            raise EngineError("the dummy engine was told to fail")
        if fault == "dead":
            raise EngineDead("the dummy engine was told to die")
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(float(self._options.get("hang_s", 3600.0)))


class DummyEngine:
    """See the module. Raises RecipeError for an option that it does not know."""

    def __init__(self, teacher: TeacherSpec, model: "ModelFolder | None", spec: CaptureSpec) -> None:
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
        """What the recipe's options made of it."""
        return self._description

    def score(self, sequences: Sequence[TokenSequence]) -> list[Signals]:
        """Signals of every sequence, after whatever faults are due."""
        self._faults.strike([sequence.sequence_id for sequence in sequences])
        max_tokens = self._options.get("max_tokens")
        check_rows(sequences, self._description.vocabulary, None if max_tokens is None else int(max_tokens))
        self._faults.work(sum(len(sequence.input_ids_N) for sequence in sequences))
        return [self._score(sequence) for sequence in sequences]

    def lm_head(self) -> LmHead:
        """The weights that turn `exact_hidden_TD` into this teacher's logits, exactly."""
        return LmHead(weight_VD=_bf16(self._head_VD))

    def close(self) -> None:
        """Nothing is held."""

    def _weights(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        generator = np.random.Generator(np.random.Philox(key=int(self._options.get("seed", 0))))
        shape = (2, self._description.vocabulary, self._description.hidden_width)
        eighths = generator.integers(-8, 9, size=shape, dtype=np.int8)
        embedding, head = eighths.astype(np.float32) / 8
        return embedding, head

    def _score(self, sequence: TokenSequence) -> Signals:
        ids = sequence.input_ids_N
        state_TD = self._state(ids[:-1])
        boundary_V = np.arange(self._description.vocabulary) % 4 == 0 if self._spec.boundary else None
        logits_TV = state_TD @ self._head_VD.T
        signals = reference_signals(logits_TV, ids[1:], self._spec, sequence.sequence_id, boundary_V)
        layers = [state_TD if i == -1 else np.roll(state_TD, i + 1, axis=1) for i in self._spec.hidden_layers]
        return replace(
            signals,
            hidden_TLD=_bf16(np.stack(layers, axis=1)) if layers else None,
            exact_hidden_TD=_bf16(state_TD) if sequence.audited else None,
        )

    def _state(self, ids_T: NDArray[np.int32]) -> NDArray[np.float32]:
        """Each token's embedding and half of the one before: sixteenths, exact in bfloat16."""
        now = self._embedding_VD[ids_T]
        before = np.zeros_like(now)
        before[1:] = now[:-1]
        return now + np.float32(0.5) * before


def _bf16(values: NDArray[np.float32]) -> Bf16Array:
    """The upper half of each float32, which loses nothing of values that bfloat16 can hold."""
    bits: Bf16Array = (np.ascontiguousarray(values).view(np.uint32) >> 16).astype(np.uint16)
    return bits
