"""What a model of a family without a row is made of: told before anything is computed."""

from __future__ import annotations

from pathlib import Path

_MOST_LAYERS = 200
"""Beyond any model that people have; more are not built only to be named."""


def modules_met(folder: Path) -> str:
    """Return a sentence with the modules of the decoder layers of a folder's model.

    The stock classes are built without weights, and no code in the folder is run.

    Args:
        folder: holds ``config.json``.

    Returns:
        The sentence, with a blank before it; empty where transformers know no such model either.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        if config.num_hidden_layers > _MOST_LAYERS:
            return ""
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception:  # of every kind: nobody has checked these values; the family is refused all the same
        return ""
    layers = max((each for each in model.modules() if isinstance(each, torch.nn.ModuleList)), key=len, default=())
    met = {f"{name} ({type(part).__name__})": None for layer in layers for name, part in layer.named_children()}
    return f" Its layers hold {', '.join(met)}." if met else ""
