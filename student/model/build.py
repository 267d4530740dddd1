"""Build the student from a teacher, a checkpoint or a config, and wrap it for training on packed sequences."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from pipeline.config import LoraSpec, Recipe, StudentSpec, TrainingSpec
from pipeline.errors import ModelError, RecipeError
from pipeline.models.causal_lm import decoder_layers, head_scale_and_cap, hidden_states
from pipeline.models.folders import resolve_model
from student.head.chunked import HeadSpec
from student.model.prune import prune_checkpoint, resolve_layers

disable_progress_bar()  # transformers shows one per file, also without a terminal

States = dict[int, Tensor]
"""Hidden states [N, D] by layer number (as in `pipeline.contracts`)."""


def build_student(spec: StudentSpec, recipe: Recipe, vocabulary: int) -> PreTrainedModel:
    """Return the student with its initial weights in float32.

    `vocabulary` is the width of the cached teacher's LM head, used if `student.config` has no `vocab_size`.
    Raises ModelError or RecipeError.
    """
    torch.manual_seed(recipe.seed if spec.seed is None else spec.seed)
    if spec.config is not None:
        return _from_config(spec.config, vocabulary)
    if spec.checkpoint is not None:
        return load_model(resolve_model(spec.checkpoint, revision=spec.revision).path)
    teacher = recipe.teacher_by_name(spec.from_teacher or "")
    source = resolve_model(teacher.model, revision=teacher.revision).path
    keep = resolve_layers(spec.layers or 1, AutoConfig.from_pretrained(source).num_hidden_layers)
    with tempfile.TemporaryDirectory(prefix="stillhouse-student-") as folder:
        prune_checkpoint(source, keep, Path(folder))
        return load_model(Path(folder))


def load_model(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load the causal LM in `folder`. Raises ModelError if transformers cannot."""
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"model {folder}: transformers cannot load it: {_first_line(error)}") from error
    return model


def _from_config(values: dict[str, Any], vocabulary: int) -> PreTrainedModel:
    values = {"vocab_size": vocabulary, **values}
    model_type = values.pop("model_type", None)
    try:
        config = AutoConfig.for_model(model_type, **values)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise RecipeError(f"student.config: transformers cannot build it: {_first_line(error)}") from error
    return model


class Student(nn.Module):
    """A causal LM for training on packed sequences: tokens in, hidden states out, the LM head as a matrix.

    `position_ids_N` restarts at 0 with each sequence; transformers builds the block-diagonal attention mask from it if
    there is neither an attention mask nor a key-value cache.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        layers, config = decoder_layers(model), model.config
        if layers is None:
            depth = config.num_hidden_layers
            raise ModelError(f"student {config.model_type}: expected a list of {depth} decoder layers, got none")
        self.layers = layers

    @property
    def depth(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    @property
    def vocabulary(self) -> int:
        """Rows of the LM head."""
        return int(self.head()[0].shape[0])

    @property
    def width(self) -> int:
        """Hidden width D."""
        return int(self.model.get_input_embeddings().weight.shape[1])

    def states(self, input_ids_N: Tensor, position_ids_N: Tensor, layers: Sequence[int] = ()) -> tuple[Tensor, States]:
        """Return the LM head's input [N, D] and the states of `layers`, numbered as in `pipeline.contracts`."""
        with hidden_states(self.layers, layers) as batches:
            last_ND = self.model.base_model(
                input_ids=input_ids_N[None], position_ids=position_ids_N[None], use_cache=False
            ).last_hidden_state[0]
        states = {layer: batch_BND[0] for layer, batch_BND in batches.items()}
        return last_ND, states | ({-1: last_ND} if -1 in layers else {})

    def head(self) -> tuple[Tensor, Tensor | None]:
        """Return weight [V, D] and bias [V] of the LM head: the parameters themselves, tied or not."""
        head = self.model.get_output_embeddings()
        return head.weight, getattr(head, "bias", None)


def head_spec(config: PretrainedConfig) -> HeadSpec:
    """Return the logit scale and soft cap of this architecture."""
    scale, soft_cap = head_scale_and_cap(config.to_dict())
    return HeadSpec(scale=scale, soft_cap=soft_cap)


def prepare_for_training(student: Student, training: TrainingSpec) -> None:
    """Apply the recipe's LoRA, frozen parameters, activation checkpointing and torch.compile to the student.

    Raises RecipeError for a `freeze` prefix that matches no parameter, or if no parameter is left to train.
    """
    if training.lora is not None:
        _add_lora(student.model, training.lora)
    for prefix in training.freeze:
        matched = [p for name, p in student.model.named_parameters() if name.startswith(prefix)]
        if not matched:
            first = next(name for name, _ in student.model.named_parameters())
            raise RecipeError(f"training.freeze: expected a prefix of parameter names such as {first}, got {prefix!r}")
        for parameter in matched:
            parameter.requires_grad_(False)
    if not any(p.requires_grad for p in student.model.parameters()):
        raise RecipeError("training.freeze: expected a parameter left to train, got none")
    if training.activation_checkpointing:
        student.model.gradient_checkpointing_enable({"use_reentrant": False})
    if training.compile:
        student.model.base_model.compile(dynamic=True)


def _add_lora(model: PreTrainedModel, lora: LoraSpec) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets, task_type="CAUSAL_LM")
    try:
        inject_adapter_in_model(config, model)
    except ValueError as error:
        raise RecipeError(f"training.lora.targets: {_first_line(error)}") from error


def check_packing(student: Student) -> None:
    """Compare the states of two packed sequences with those of each alone.

    Raises ModelError if they differ, as with state-space models, which ignore position ids.
    """
    device = student.head()[0].device
    ids_N = torch.arange(2, 10, device=device) % student.head()[0].shape[0]
    position_N = torch.arange(4, device=device)
    training = student.training
    student.eval()
    with torch.no_grad():
        packed_ND, _ = student.states(ids_N, torch.cat([position_N, position_N]))
        alone_ND = torch.cat([student.states(half, position_N)[0] for half in (ids_N[:4], ids_N[4:])])
    student.train(training)
    if not torch.allclose(packed_ND, alone_ND, rtol=1e-3, atol=1e-3):
        raise ModelError(
            f"student {student.model.config.model_type}: a packed sequence depends on the one before (states differ by "
            f"{(packed_ND - alone_ND).abs().max():.3g}); expected a model whose attention honours position_ids"
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
