"""How a wrong configuration is refused: one line, with its place and the remedy, before anything is written."""

import pytest

from longtrain import cli


@pytest.fixture
def refused(capsys):
    def run(*arguments: str) -> str:
        """The one line with which `longtrain train` refuses."""
        assert cli.main(["train", *arguments]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1 and captured.err.endswith("\n")
        return captured.err.rstrip("\n")

    return run


@pytest.fixture
def check_refused(refused, tmp_path):
    def check(right: str, old: str, new: str, line: int, setting: str, remedy: str) -> None:
        """A file that is right but for `new` in the place of `old`."""
        assert old in right
        file = tmp_path / "run.yaml"
        file.write_text(right.replace(old, new, 1).replace("OUT", str(tmp_path / "out")))
        message = refused(str(file))
        assert message.startswith(f"{file}:{line}: {setting}: ")
        assert remedy.format(file=file) in message
        assert "; " in message, "no remedy"
        assert list(tmp_path.iterdir()) == [file], "something was written"

    return check
