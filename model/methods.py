"""From an artifact's description to its model: the one place where the four methods stand side by side."""

import torch

from model.artifact import Description, load_trained
from model.checkpoint import CheckpointError
from model.model_adapter import apply_adapter
from model.model_lora import apply_lora
from model.model_minimind import MiniMindForCausalLM
from model.model_projection_head import ClsTunedModel
from model.model_prompt_tuning import PromptTuningModel


def attach(
    base: MiniMindForCausalLM, description: Description, tensors: dict[str, torch.Tensor], source: str
) -> torch.nn.Module:
    """Put a method's trained tensors onto its frozen base; returns the model to call, in evaluation mode.

    Raises:
        CheckpointError: an unknown method, or tensors that do not fit the settings and the base.
    """
    settings = description.settings
    try:
        match description.method:
            case "lora":
                apply_lora(base, settings["rank_map"], settings["alpha"])
                model = base
            case "adapter":
                apply_adapter(base, settings["middle_features"])
                model = base
            case "prompt_tuning":
                model = PromptTuningModel(base, torch.zeros(settings["num_virtual_tokens"], base.config.hidden_size))
            case "projection_head":
                model = ClsTunedModel(base, len(description.labels))
            case _:
                raise CheckpointError(f"{source} was made by an unknown method, {description.method!r}")
    except CheckpointError:
        raise
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"{source}: its settings do not fit the base: {error}") from None
    load_trained(model, tensors, source)
    return model.eval()
