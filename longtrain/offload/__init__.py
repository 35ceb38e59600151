"""The token store: where the bytes of the sequence live."""

from longtrain.offload.disk import check_disk
from longtrain.offload.place import DEVICE, DiskSettings, Place
from longtrain.offload.saved import saved_tensors
from longtrain.offload.store import DeviceStore, Stored, TokenStore, version_of
from longtrain.offload.tiered import TieredStore

__all__ = [
    "DEVICE", "DeviceStore", "DiskSettings", "Place", "Stored", "TieredStore", "TokenStore", "check_disk", "saved_tensors", "version_of",
]
