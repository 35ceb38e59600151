"""The token store: where the bytes of the sequence live."""

from longtrain.offload.store import DeviceStore, Stored, TokenStore, version_of

__all__ = ["DeviceStore", "Stored", "TokenStore", "version_of"]
