"""A tiny model of no known family: what a row has to say that Llama's does not.

Every module and size has another name; weights are GPT-2's transposed ones; queries, keys and values share one matrix,
KV group by KV group, as in Falcon; gate and up share another, one below the other; there are biases everywhere.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.generation.utils import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.pytorch_utils import Conv1D

from .configuration_loom import LoomConfig


def rotate(x, cos, sin):
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


class Feed(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.wide = Conv1D(2 * config.ffn_width, config.d_model)
        self.narrow = Conv1D(config.d_model, config.ffn_width)

    def forward(self, x):
        gate, up = self.wide(x).chunk(2, dim=-1)
        return self.narrow(F.gelu(gate) * up)


class Mixer(nn.Module):
    def __init__(self, config, slot):
        super().__init__()
        self.config, self.slot = config, slot
        self.groups, self.each, self.width = config.n_group, config.n_head // config.n_group, config.head_width
        self.fused = Conv1D((config.n_head + 2 * config.n_group) * self.width, config.d_model)
        self.out = Conv1D(config.d_model, config.n_head * self.width)

    def forward(self, hidden_states, position_embeddings, attention_mask=None, past_key_values=None, **kwargs):
        batch, length, _ = hidden_states.shape
        fused = self.fused(hidden_states).view(batch, length, self.groups, self.each + 2, self.width)
        query, key, value = fused.split((self.each, 1, 1), dim=3)
        query, key, value = (x.flatten(2, 3).transpose(1, 2) for x in (query, key, value))
        query, key = rotate(query, *position_embeddings), rotate(key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.slot)
        key, value = (x.repeat_interleave(self.each, dim=1) for x in (key, value))
        causal = attention_mask is None and length > 1
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, is_causal=causal)
        return self.out(mixed.transpose(1, 2).flatten(2)), None


class Stage(nn.Module):
    def __init__(self, slot, config):
        super().__init__()
        self.norm_a, self.norm_b = nn.LayerNorm(config.d_model), nn.LayerNorm(config.d_model)
        self.mixer, self.feed = Mixer(config, slot), Feed(config)

    def forward(self, hidden_states, **kwargs):
        hidden_states = hidden_states + self.mixer(hidden_states=self.norm_a(hidden_states), **kwargs)[0]
        return hidden_states + self.feed(self.norm_b(hidden_states))


class LoomPreTrainedModel(PreTrainedModel):
    config_class = LoomConfig
    base_model_prefix = "cloth"
    _no_split_modules = ["Stage"]  # noqa: RUF012
    _supports_sdpa = True


class LoomModel(LoomPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.d_model)
        self.stages = nn.ModuleList([Stage(number, config) for number in range(config.n_layer)])
        self.last_norm = nn.LayerNorm(config.d_model)
        self.post_init()

    def get_input_embeddings(self):
        return self.words

    def set_input_embeddings(self, value):
        self.words = value

    def rotary(self, positions, dtype):
        exponents = torch.arange(0, self.config.head_width, 2, device=positions.device) / self.config.head_width
        angles = positions[:, None, :, None] / self.config.rope_theta**exponents
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None, **kwargs
    ):
        hidden = self.words(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(hidden.shape[1], device=hidden.device) + past)[None]
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        rotary = self.rotary(position_ids, hidden.dtype)
        for stage in self.stages:
            hidden = stage(hidden, attention_mask=mask, position_embeddings=rotary, past_key_values=past_key_values)
        return BaseModelOutputWithPast(last_hidden_state=self.last_norm(hidden), past_key_values=past_key_values)


class LoomForCausalLM(LoomPreTrainedModel, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        self.cloth = LoomModel(config)
        self.readout = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self):
        return self.readout

    def set_output_embeddings(self, new_embeddings):
        self.readout = new_embeddings

    def forward(self, input_ids=None, labels=None, logits_to_keep=0, **kwargs):
        output = self.cloth(input_ids=input_ids, **kwargs)
        logits = self.readout(output.last_hidden_state[:, -logits_to_keep:] if logits_to_keep else output[0])
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=output.past_key_values)
