"""Tiers, extents and the swap schedule: where the bytes of the sequence live."""

from longtrain.offload.store import DeviceStore, Stored, TokenStore

__all__ = ["DeviceStore", "Stored", "TokenStore"]
