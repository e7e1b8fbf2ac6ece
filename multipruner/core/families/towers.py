"""Models of several modalities as rows of data: where the language model lies in them, which is pruned like any other.

A checkpoint of such a class, a wrapper, has a configuration within its own and tensors under names of their own for its
text tower. As a folder by itself the tower is an ordinary model of a family.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from .family import Family

TEXT = "text_config"
"""The key of a wrapper's configuration that holds the tower's own."""
NOW = ("model.language_model.", "lm_head.")
"""How the names of the tower's layers and of its head begin in transformers' classes, and in some files."""
_ABOUT = ("_name_or_path", "architectures", "auto_map", "dtype", "model_type", "torch_dtype", "transformers_version")
"""Keys of a configuration that say nothing of sizes."""


@dataclass(frozen=True, slots=True)
class Tower:
    """The text tower of one kind of wrapper.

    Attributes:
        model_type: the wrapper's ``config.model_type``.
        class_name: its stock class.
        earlier: how names begin in files of the layout that transformers wrote first, and may write still.
        text: model types of the tower without a family's row -> the family that computes the same of text.
        rotary: what the settings of rotary embeddings say of pictures alone.
        entered: the key of ``vision_config`` that lists what enters the first layers, one each; empty where pictures
            enter with the embeddings.
    """

    model_type: str
    class_name: str
    earlier: tuple[str, str] = ("language_model.model.", "language_model.lm_head.")
    text: Mapping[str, str] = field(default_factory=dict, hash=False)
    rotary: tuple[str, ...] = ()
    entered: str = ""

    @property
    def starts(self) -> tuple[str, str]:
        """How the names of the tower's layers begin, in one layout of files or the other."""
        return NOW[0], self.earlier[0]

    def names(self, stored: Collection[str], spec: Family) -> dict[str, str]:
        """Return the tower's tensors among those of a wrapper's files, by the names that they have as a model.

        Args:
            stored: names in the files, in either layout.
            spec: the family of the tower.

        Returns:
            Name in the files -> name in the causal language model; empty where there are none.
        """
        decoder = next((start for start in self.starts if any(name.startswith(start) for name in stored)), None)
        if decoder is None:
            return {}
        outer = spec.decoder.partition(".")[0]
        ways = {decoder: f"{outer}.", **dict.fromkeys((NOW[1], self.earlier[1]), f"{spec.head}.")}
        return {name: own + name.removeprefix(start) for start, own in ways.items() for name in stored
                if name.startswith(start)}  # fmt: skip

    def merged(
        self, record: Mapping[str, Any], spec: Family, dense: Mapping[str, Any], pruned: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return a wrapper's configuration in which the tower is a pruned one.

        Args:
            record: the wrapper's ``config.json``, which says the tower's sizes apart or, as older ones, among its own.
            spec: the family of the tower.
            dense, pruned: the configurations of the tower as a model, with every key.
        """
        differ = {key for key, value in pruned.items() if key not in _ABOUT and dense.get(key, ...) != value}
        # a size that is not said follows from others, dense ones
        sizes = {key for key in (*spec.keys, spec.depth) if pruned.get(key) is not None}
        changed = {key: pruned[key] for key in sorted(differ | sizes)}
        inner = record.get(TEXT)
        if not isinstance(inner, Mapping):
            return {**record, **changed}
        return {**record, TEXT: {**inner, **changed}}

    def enters(self, record: Mapping[str, Any]) -> int:
        """Return how many of the first layers something of a picture enters behind.

        Args:
            record: the wrapper's configuration, with every key.
        """
        return len((record.get("vision_config") or {}).get(self.entered) or ()) if self.entered else 0


_BESIDE = ("model.", "lm_head.")
"""Layers under the names of a language model alone, vision beside them."""
_GRID = ("mrope_section", "mrope_interleaved")
"""Which of the rotary embeddings tell height and width; of text all tell the same."""
TOWERS: dict[str, Tower] = {
    row.model_type: row
    for row in (
        Tower("gemma3", "Gemma3ForConditionalGeneration"),
        Tower("internvl", "InternVLForConditionalGeneration"),
        Tower("llava", "LlavaForConditionalGeneration"),
        Tower("llava_next", "LlavaNextForConditionalGeneration"),
        Tower("llava_onevision", "LlavaOnevisionForConditionalGeneration"),
        Tower("mistral3", "Mistral3ForConditionalGeneration"),
        Tower("qwen2_vl", "Qwen2VLForConditionalGeneration", _BESIDE, {"qwen2_vl_text": "qwen2"}, _GRID),
        Tower("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", _BESIDE, {"qwen2_5_vl_text": "qwen2"}, _GRID),
        Tower("qwen3_vl", "Qwen3VLForConditionalGeneration", text={"qwen3_vl_text": "qwen3"}, rotary=_GRID,
              entered="deepstack_visual_indexes"),
        Tower("vipllava", "VipLlavaForConditionalGeneration"),
    )
}  # fmt: skip
"""The wrappers whose text tower can be taken out, by ``config.model_type``."""
