"""What ends a command with one line to show, wherever it happens."""


class RunError(Exception):
    """The run stopped; the message says where and what to do. The command ends with exit code 1."""
