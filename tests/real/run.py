"""Runs s01 and s03 against a real llama.cpp server with a real, small model.

python tests/real/run.py [pytest options]   (downloads about 110 MB once)
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
REQUIREMENTS = HERE / "requirements.txt"


def interpreter_of(folder: Path) -> Path:
    """The Python of a virtual environment."""
    windows = folder / "Scripts" / "python.exe"
    return windows if os.name == "nt" else folder / "bin" / "python"


def prepare() -> Path:
    """The interpreter that has the requirements, from a folder that is made once."""
    digest = hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()[:12]
    folder = Path(tempfile.gettempdir()) / f"mini-openclaw-real-{digest}"
    python = interpreter_of(folder)
    done = folder / "installed"
    if not done.exists():
        venv.create(folder, with_pip=True)
        install = [python, "-m", "pip", "install", "--quiet", "--no-deps"]
        install += ["--only-binary", ":all:", "-r", REQUIREMENTS]
        subprocess.run(install, check=True)
        done.touch()
    return python


def main() -> int:
    os.environ["REAL_MODEL_PYTHON"] = str(prepare())
    command = [sys.executable, "-m", "pytest", str(HERE / "real_model.py"), "-n", "0"]
    return subprocess.call(
        [*command, "--timeout", "600", *sys.argv[1:]], cwd=HERE.parents[1]
    )


if __name__ == "__main__":
    sys.exit(main())
