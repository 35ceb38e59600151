"""What memory holds, measured: `lt.profile`, `longtrain profile`, `longtrain compare`. Read `watch.py`, `ledger.py`, `account.py`."""

from longtrain.memory.profile import profile

__all__ = ["profile"]
