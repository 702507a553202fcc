"""The exit statuses of the `llamita` command, for the verbs and for the workflows that end one."""

import signal

USER_MISTAKE = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells report Ctrl-C
TERMINATED = 143  # 128 + SIGTERM: a scheduler asked for the end, by that signal or by SIGUSR1
BROKEN_PIPE = 141  # 128 + SIGPIPE


def of_signal(number: int) -> int:
    """Returns the status of a run that a signal ended after it had saved; 0 stands for Ctrl-C, as SIGINT does."""
    return INTERRUPTED if number in (0, signal.SIGINT) else TERMINATED
