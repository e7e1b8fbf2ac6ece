"""Configuration of the Baichuan-shaped stand-in (see ``modeling_baichuan.py``)."""

from transformers import PreTrainedConfig


class BaichuanConfig(PreTrainedConfig):
    model_type = "baichuan"

    vocab_size: int = 97
    hidden_size: int = 64
    intermediate_size: int = 40
    num_hidden_layers: int = 3
    num_attention_heads: int = 4
    max_position_embeddings: int = 64
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | None = 2
