"""The token store: where the bytes of the sequence live."""

from longtrain.offload.place import DEVICE, DiskSettings, Place
from longtrain.offload.store import DeviceStore, Stored, TokenStore, version_of

__all__ = ["DEVICE", "DeviceStore", "DiskSettings", "Place", "Stored", "TokenStore", "version_of"]
