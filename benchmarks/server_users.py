"""Users of the soak of the server, for locust: chats long and short, some that hang up, some that send nonsense.

`benchmarks/soak_server.py` runs it; alone: locust -f benchmarks/server_users.py --headless -u 16 -t 1m --host URL
"""

import json
import random
import time

from locust import HttpUser, constant, task

LEAVE, NONSENSE = 0.2, 0.05
"""The shares of requests that are left before their end, and that are malformed."""
WORDS = ("river", "stone", "winter", "garden", "letter", "mountain")
BROKEN = (b"{", b"[]", b'{"messages": []}', b'{"messages": [{"role": "user", "content": "\\ud800"}]}', b"\xff" * 1000)


class ChatUser(HttpUser):
    """Asks one streamed chat after the other; a full queue (429) is an answer too."""

    wait_time = constant(0)

    @task
    def chat(self) -> None:
        if random.random() < NONSENSE:
            self.send_nonsense()
            return
        long = random.random() < 0.3
        text = " ".join(random.choices(WORDS, k=150 if long else 12))
        body = {
            "messages": [{"role": "user", "content": text}],
            "max_tokens": random.choice((64, 128)) if long else random.choice((4, 16, 32)),
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        lines_wanted = random.randrange(1, 20) if random.random() < LEAVE else None
        name = "chat, left" if lines_wanted else "chat, long" if long else "chat, short"
        begun = time.perf_counter()
        with self.client.post(
            "/v1/chat/completions", json=body, stream=True, name=name, catch_response=True, timeout=120
        ) as answer:
            if answer.status_code == 429 and "retry-after" in answer.headers:
                answer.success()
                time.sleep(0.5)
                return
            if answer.status_code != 200:
                answer.failure(f"status {answer.status_code}")
                return
            last = ""
            for number, line in enumerate(line for line in answer.iter_lines() if line):
                if lines_wanted is not None and number >= lines_wanted:
                    answer.success()
                    answer.close()
                    return
                last = line.decode()
                if last.startswith("data: {") and "error" in json.loads(last[6:]):
                    answer.failure(last[:200])
                    return
            if last == "data: [DONE]" or lines_wanted is not None:
                answer.success()
            else:
                answer.failure(f"the stream ended with {last[:80]!r}")
            answer.request_meta["response_time"] = 1000 * (time.perf_counter() - begun)

    def send_nonsense(self) -> None:
        with self.client.post(
            "/v1/chat/completions", data=random.choice(BROKEN), headers={"content-type": "application/json"},
            name="nonsense", catch_response=True,
        ) as answer:  # fmt: skip
            if answer.status_code == 400 and answer.json()["error"]["message"]:
                answer.success()
            else:
                answer.failure(f"status {answer.status_code}")
