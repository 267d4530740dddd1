"""Parts of a transformers causal LM that are not named alike in all architectures: decoder layers, logit transform."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn


def decoder_layers(model: Any) -> "nn.ModuleList | None":
    """Return the ModuleList of decoder layers, found by its length, or None."""
    from torch import nn

    depth = model.config.get_text_config().num_hidden_layers
    lists = (module for module in model.base_model.modules() if isinstance(module, nn.ModuleList))
    return next((module for module in lists if len(module) == depth), None)


@contextmanager
def hidden_states(layers: "nn.ModuleList", numbers: Sequence[int]) -> "Iterator[dict[int, Tensor]]":
    """Collect hidden states [B, N, D] of a forward pass: 0 is the input of decoder layer 0, i the output of layer i-1.

    Negative numbers are skipped.
    """
    states: dict[int, Tensor] = {}

    def keep_input(_module: Any, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states[0] = inputs[0] if inputs else kwargs["hidden_states"]

    def keep_output(number: int) -> Any:
        def keep(_module: Any, _inputs: tuple[Any, ...], output: Any) -> None:
            states[number] = output[0] if isinstance(output, tuple) else output

        return keep

    with ExitStack() as hooks:
        if 0 in numbers:
            hooks.enter_context(layers[0].register_forward_pre_hook(keep_input, with_kwargs=True))
        for number in (number for number in numbers if number > 0):
            hooks.enter_context(layers[number - 1].register_forward_hook(keep_output(number)))
        yield states


def head_scale_and_cap(config: Mapping[str, Any]) -> tuple[float, float | None]:
    """Return what follows the LM head's matrix: a scale (Cohere multiplies, Granite divides) and Gemma 2's soft cap."""
    scale = float(config.get("logit_scale") or 1.0) / float(config.get("logits_scaling") or 1.0)
    cap = config.get("final_logit_softcapping")
    return scale, None if cap is None else float(cap)
