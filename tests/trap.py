"""What crash_lab.py puts into the script it kills: a function at which the process
kills itself.
"""

import functools
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

# [function, a word in its arguments, moment, the file that arms the trap]
SETTING = "CRASH_AT"


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(script: dict) -> None:
    """Wrap one function of a script: the first call that has the word, once it is
    armed, kills.

    The moment is before the call, after it, or half: of a record, half a line is
    written. With never, the call is not made, and somebody else has to kill.
    """
    name, word, moment, armed = json.loads(os.environ[SETTING])
    owner, _, method = name.partition(".")
    function = getattr(script[owner], method)

    @functools.wraps(function)
    def trapped(*args: object, **named: object) -> object:
        if word not in repr(args[1:]) or not Path(armed).exists():
            return function(*args, **named)
        return spring(moment, function, *args, **named)

    setattr(script[owner], method, trapped)


def spring(moment: str, function: Callable, *args: object, **named: object) -> None:
    """Go as far as the moment, and die."""
    if moment == "half":
        journal, record = args[:2]
        line = json.dumps(record).encode()
        os.write(journal.file, line[: len(line) // 2])
    elif moment == "after":
        function(*args, **named)
    elif moment == "never":
        time.sleep(3600)
    die()
