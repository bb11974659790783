"""The judge's answers on disk: each one is kept as it arrives, so that no run pays for it again."""

import json
import os
from pathlib import Path

from dataset.rows import DataError
from train.judge_client import JudgeError

try:
    import fcntl
except ImportError:  # Windows has no flock: there, two runs at once need two cache files
    fcntl = None


def read_answers(path: Path) -> dict[str, dict]:
    """Return the answers by key that a file holds, none where there is no file; nothing is written or locked.

    Raises:
        DataError: a line is damaged. A last line that a crash cut short, or that is being written, is left out.
    """
    content = path.read_bytes() if path.exists() else b""
    answers = {}
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        try:
            answer = json.loads(line)
            key = answer.pop("key")
            answers[key] = {"status": answer["status"], "reason": answer["reason"], **answer}
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            raise DataError(f"{path}:{number}: not an answer of a judge; remove the line") from None
    return answers


class AnswerFile:
    """Answers by key, kept in a JSONL file that one run at a time may hold.

    Raises:
        JudgeError: another run holds the file.
        DataError: a line is damaged. A last line that a crash cut short is dropped instead.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(path, "a+b")  # noqa: SIM115 (closed by `__exit__`)
        try:
            if fcntl:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.answers = read_answers(path)
        except BlockingIOError:
            self.file.close()
            raise JudgeError(f"{path} is in use by another run; wait for it, or give another --judge_cache") from None
        except DataError:
            self.file.close()
            raise
        self.file.truncate(path.read_bytes().rfind(b"\n") + 1)

    def add(self, key: str, answer: dict) -> None:
        """Keep an answer; all but an error is written so that it outlives a crash of the program or the machine."""
        self.answers[key] = answer
        if answer["status"] != "error":
            self.file.write(json.dumps({"key": key, **answer}).encode() + b"\n")
            self.file.flush()
            os.fsync(self.file.fileno())

    def __enter__(self) -> "AnswerFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
