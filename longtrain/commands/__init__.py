"""Commands that bring several parts together; one that is of a single part stands there (`planner/calibrate.py`, `report/page.py`)."""
