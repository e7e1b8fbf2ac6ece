"""What a structure costs: parameters, FLOPs, bytes. Arithmetic only; the coefficients are read off the model."""

from __future__ import annotations

from dataclasses import dataclass

from .structure import LayerSize, Structure


@dataclass(frozen=True, slots=True)
class LayerCost:
    """Parameters of one decoder layer, linear in its size. Norms belong to the block they feed.

    ``matrix_*`` counts only what is multiplied per token (no norms, no biases), for FLOPs.
    """

    attention_fixed: int
    per_query_head: int
    per_kv_head: int
    mlp_fixed: int
    per_channel: int
    matrix_per_query_head: int
    matrix_per_kv_head: int
    matrix_per_channel: int

    def parameters(self, size: LayerSize) -> int:
        """Parameters of a layer of this size."""
        total = 0
        if size.has_attention:
            total += self.attention_fixed
            total += size.query_heads * self.per_query_head + size.kv_heads * self.per_kv_head
        if size.has_mlp:
            total += self.mlp_fixed + size.channels * self.per_channel
        return total

    def macs_per_token(self, size: LayerSize) -> int:
        """Multiply-accumulates of the projections for one token."""
        return (
            size.query_heads * self.matrix_per_query_head
            + size.kv_heads * self.matrix_per_kv_head
            + size.channels * self.matrix_per_channel
        )


@dataclass(frozen=True, slots=True)
class Costs:
    """Structure -> numbers.

    Attributes:
        dense: the dense structure, what every ratio refers to.
        layer: the cost of one decoder layer (alike in all layers of the supported families).
        constant: parameters outside the decoder layers (embeddings counted once when tied).
        head_dim: width of one attention head.
        head_macs: multiply-accumulates of the output projection for one token.
        bytes_per_parameter: of the checkpoint's dtype.
    """

    dense: Structure
    layer: LayerCost
    constant: int
    head_dim: int
    head_macs: int
    bytes_per_parameter: int

    def backbone_parameters(self, structure: Structure) -> int:
        """Parameters of the decoder layers alone."""
        return sum(self.layer.parameters(size) for size in structure)

    def parameters(self, structure: Structure) -> int:
        """All parameters, tied embeddings counted once."""
        return self.constant + self.backbone_parameters(structure)

    def ratio(self, structure: Structure) -> float:
        """Removed parameters / all parameters of the dense model (the paper's pruning ratio)."""
        return 1.0 - self.parameters(structure) / self.parameters(self.dense)

    def backbone_ratio(self, structure: Structure) -> float:
        """Removed parameters / parameters of the dense decoder layers."""
        return 1.0 - self.backbone_parameters(structure) / self.backbone_parameters(self.dense)

    def weight_bytes(self, structure: Structure) -> int:
        """Size of the weights in the checkpoint's dtype."""
        return self.parameters(structure) * self.bytes_per_parameter

    def kv_bytes_per_token(self, structure: Structure) -> int:
        """KV-cache bytes that one token of context takes."""
        return sum(2 * size.kv_heads * self.head_dim for size in structure) * self.bytes_per_parameter

    def flops_per_token(self, structure: Structure, context: int = 0) -> int:
        """Floating-point operations for one token; a multiply-accumulate counts as two.

        Args:
            structure: of the model.
            context: tokens that attention scores are computed against; projections and output head always count.
        """
        macs = self.head_macs + sum(self.layer.macs_per_token(size) for size in structure)
        macs += sum(2 * context * size.query_heads * self.head_dim for size in structure)
        return 2 * macs
