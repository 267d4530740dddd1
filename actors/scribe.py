"""The Ray actor that hosts a teacher as a writer: it takes a batch of prompts and leaves their answers in the store."""

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import ray

from actors.departure import Departure
from actors.engines.writers import Prompt, Writer, open_writer
from actors.lease import Arrival, Casualty, Lease, Outcome
from actors.rows import ask_rows
from pipeline.cache import quarantine
from pipeline.cache.storage.store import Store
from pipeline.config import TeacherSpec
from pipeline.config.capture import SamplingSpec
from pipeline.contracts import Completion, Document, IntArray
from pipeline.corpus.answers import PromptBatch, append_answer, prompt_name, write_answers
from pipeline.corpus.prepare import resolve_teacher_model
from pipeline.errors import CorpusError, EngineDead, StillhouseError
from pipeline.identity import uniform
from pipeline.models.tokenizers import ByteTokenizer, Tokenizer, load_tokenizer


@dataclass(frozen=True, slots=True)
class Commission:
    """Who writes, how, and where the answers go."""

    cache_uri: str
    teacher: TeacherSpec
    sampling: SamplingSpec
    threads: int
    """For the arithmetic of an engine on a CPU."""
    positions: int
    """Tokens of the longest prompt and its answer."""


class Scribe:
    """One writer, one call at a time. Every call may be repeated at any time: a batch is written once."""

    def __init__(self, commission: Commission) -> None:
        os.environ["OMP_NUM_THREADS"] = str(commission.threads)  # Ray sets it to 1; torch reads it when it is imported
        self._commission = commission
        self._store = Store.open(commission.cache_uri)
        self._writer: Writer | None = None
        self._tokenizer: Tokenizer = ByteTokenizer()
        self._positions = commission.positions
        self._departure = Departure()

    def arrive(self) -> Arrival:
        """Where it is, as soon as it has a place. A process that is about to leave never answers."""
        self._departure.hold()
        return Arrival(os.getpid(), ray.get_runtime_context().get_node_id())

    def open(self) -> None:
        """Open the engine. Raises ModelError and EngineDead."""
        self._writer = self._departure.upon_death(self._open_writer)

    def write(self, lease: Lease, batch: PromptBatch) -> Outcome:
        """Answer the batch, but for the lease's casualties, and keep the answers; or try some `rows` and keep nothing.

        Raises CorpusError, EngineDead and StorageError.
        """
        if lease.rows is None and self._store.exists(batch.path):
            return Outcome(batch.path)
        blamed = {casualty.sequence_id for casualty in lease.casualties}
        asked = [
            self._prompt(document, batch.author) for document in batch.prompts[slice(*(lease.rows or (None, None)))]
        ]
        wanted = [prompt for prompt in asked if prompt.max_tokens and prompt.sequence_id not in blamed]
        started_s = time.monotonic()
        pairs, lost = self._departure.upon_death(lambda: ask_rows(self._generate, wanted, one_by_one=lease.one_by_one))
        score_s = time.monotonic() - started_s
        lost = [*lease.casualties, *lost]
        if lease.rows is None:
            self._keep(batch, {prompt.sequence_id: completion for prompt, completion in pairs}, lost)
        tokens = sum(len(completion.input_ids_N) - completion.prompt_tokens for _, completion in pairs)
        return Outcome(batch.path, rows=len(pairs), tokens=tokens, score_s=score_s, casualties=len(lost))

    def _generate(self, prompts: list[Prompt]) -> list[Completion]:
        if self._writer is None:
            raise EngineDead(f"teacher {self._commission.teacher.name}: the engine did not open")
        return self._writer.generate(prompts)

    def _keep(self, batch: PromptBatch, completions: dict[str, Completion], lost: Sequence[Casualty]) -> None:
        """Quarantine first: a file that lacks an answer must never stand without the reason."""
        for casualty in lost:
            quarantine.record(self._store, casualty.sequence_id, batch.path, casualty.reason, casualty.engine_message)
        refused = {casualty.sequence_id for casualty in lost}
        names = {prompt_name(document, batch.author): document for document in batch.prompts}
        answers = [
            self._answered(document, completions.get(name), batch.author)
            for name, document in names.items()
            if name not in refused
        ]
        write_answers(self._store, batch.path, answers)

    def _open_writer(self) -> Writer:
        commission = self._commission
        try:
            model = resolve_teacher_model(commission.teacher)
            if model is not None:
                self._tokenizer = load_tokenizer(model.path)
                self._positions = min(commission.positions, model.positions or sys.maxsize)
            return open_writer(commission.teacher, commission.sampling, model, self._positions)
        except StillhouseError:
            raise
        except Exception as error:
            message = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise EngineDead(f"teacher {commission.teacher.name}: the engine did not open: {message}") from error

    def _prompt(self, document: Document, author: str) -> Prompt:
        """The document's tokens, up to where the answer begins. One that leaves no room is given no tokens to write."""
        try:
            ids_N = self._tokens(document)
        except CorpusError as error:
            raise CorpusError(f"corpus document {document.id!r}: {error}") from error
        sampling = self._commission.sampling
        room = max(0, self._positions - len(ids_N)) if len(ids_N) else 0
        seed = int(uniform("answer", sampling.seed, document.id) * 2**31)
        return Prompt(prompt_name(document, author), ids_N, seed, min(sampling.max_tokens, room))

    def _tokens(self, document: Document) -> IntArray:
        if document.messages is None:
            return self._tokenizer.encode(document.text or "").input_ids_N
        chat = self._tokenizer.render(document.messages, spans=False, add_generation_prompt=True)
        return self._tokenizer.encode(chat.text, rendered=True).input_ids_N

    def _answered(self, document: Document, completion: Completion | None, author: str) -> Document:
        if completion is None:
            return append_answer(document, "", author, finished=False)
        answer = self._tokenizer.decode(completion.input_ids_N[completion.prompt_tokens :])
        return append_answer(document, answer, author, finished=completion.finished)
