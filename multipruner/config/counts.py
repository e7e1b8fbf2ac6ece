"""Whole numbers as recipes have them: none is larger than what 64 bits hold."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

MOST = 2**63 - 1
Count = Annotated[int, Field(ge=1, le=MOST)]
Length = Annotated[int, Field(ge=2, le=MOST)]
"""Tokens of a sequence: one is predicted from another."""
Seed = Annotated[int, Field(ge=0, le=MOST)]
