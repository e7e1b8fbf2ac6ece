"""Configuration of a family that exists for one test (see ``modeling_loom.py``)."""

from transformers import PreTrainedConfig


class LoomConfig(PreTrainedConfig):
    model_type = "loom"
    attribute_map = {  # noqa: RUF012
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "num_key_value_heads": "n_group",
        "head_dim": "head_width",
        "intermediate_size": "ffn_width",
    }

    vocab_size: int = 97
    d_model: int = 40
    ffn_width: int = 40
    n_layer: int = 3
    n_head: int = 6
    n_group: int = 2
    head_width: int = 8
    max_position_embeddings: int = 64
    rope_theta: float = 10000.0
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | None = 2
