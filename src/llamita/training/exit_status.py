"""The exit statuses of the `llamita` command, for the verbs and for the workflows that end one."""

USER_MISTAKE = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells report Ctrl-C
BROKEN_PIPE = 141  # 128 + SIGPIPE
