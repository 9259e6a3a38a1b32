"""Attention of the tokens that are being drawn, one of each text, to all that stands before them."""

from .decode import decode_attention
from .layout import DecodeLayout, SharedPrefix

__all__ = ["DecodeLayout", "SharedPrefix", "decode_attention"]
