"""What an answer that never changes scores on the documents of lm-eval tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def floor_of(output: Mapping[str, Any], names: Sequence[str]) -> float | None:
    """Return the accuracy of an answer that never changes, over the documents of some tasks.

    Where there are choices that is the share of documents whose right answer stands at the commonest place, task by
    task. It is chance (one over the number of choices) where the place is not told, or is always the same (BLiMP
    writes the right sentence first). Without choices, as where text is generated, it is 0.
    """
    right, documents = 0.0, 0
    for name in names:
        samples = {sample["doc_id"]: sample for sample in output["samples"][name]}.values()
        documents += len(samples)
        if output.get("configs", {}).get(name, {}).get("output_type") != "multiple_choice":
            continue
        places = [sample["target"] for sample in samples]
        if all(isinstance(place, int) for place in places) and len(set(places)) > 1:
            right += max(map(places.count, set(places)))
        else:
            right += sum(1 / max(1, len(sample["resps"])) for sample in samples)
    return right / documents if documents else None
