"""Create the virtual environment that the Makefile uses, unless it is there already and works.

Runs under whatever `python3` a machine has, so it is written for old ones too, and says so in one line when the
interpreter is too old. Knows nothing of what gets installed.
"""

import os
import subprocess
import sys

OLDEST = (3, 11)


def works(directory):
    """Whether the environment's interpreter exists, is new enough and has pip."""
    test = "import sys, pip; sys.exit(sys.version_info < %r)" % (OLDEST,)
    try:
        with open(os.devnull, "w") as nowhere:
            return subprocess.call([directory + "/bin/python", "-c", test], stdout=nowhere, stderr=nowhere) == 0
    except OSError:
        return False


def main(directory):
    if works(directory):
        return 0
    if sys.version_info < OLDEST:
        sys.stderr.write(
            "error: Llamita needs Python %d.%d or newer and %s is %d.%d; name another: make PYTHON=python3.12 TARGET\n"
            % (OLDEST[0], OLDEST[1], sys.executable, sys.version_info[0], sys.version_info[1])
        )
        return 2
    return subprocess.call([sys.executable, "-m", "venv", "--clear", directory])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
