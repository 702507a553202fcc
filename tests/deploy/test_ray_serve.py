"""deploy/ray_serve.py in a Ray of its own, on this machine: answers, streams, two replicas, and one that dies."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deploy.nginx import free_port
from tests.deploy.replicas import write_model

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import asyncio, json, os, signal, sys, time
import httpx2, psutil, ray
from ray import serve
sys.path.insert(0, sys.argv[3])  # here alone: replicas get what they need of the file from Ray
from ray_serve import Settings, application
from llamita.workflows.benchmark.client import Ask, Client
from llamita.workflows.benchmark.prompts import StoryPrompts

model, port = sys.argv[1], int(sys.argv[2])
url = f"http://127.0.0.1:{port}"
ray.init(num_cpus=2, include_dashboard=False, _node_ip_address="127.0.0.1", log_to_driver=False,
         object_store_memory=100_000_000)
serve.start(http_options={"host": "127.0.0.1", "port": port})
serve.run(application(Settings(model=model, name="tiny", replicas=2, threads=1)), name="llamita")

def replicas():
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if process.info["cmdline"] and process.info["cmdline"][0].startswith("ray::ServeReplica:llamita"):
            found.append(process.pid)
    return found

async def asked(count):
    ask = Ask("tiny", "completions", max_tokens=20, temperature=0.0, ignore_eos=True)
    prompts = StoryPrompts(10, seed=1)
    async with Client(url, timeout=60) as client:
        return await asyncio.gather(*(client.request(ask, prompts.messages(n), n, 0.0, time.perf_counter)
                                      for n in range(count)))

def shown(records):
    return [[record.error, record.output_tokens, len(record.text_times)] for record in records]

models = httpx2.get(f"{url}/v1/models").json()["data"]
first = shown(asyncio.run(asked(6)))
wrong = httpx2.post(f"{url}/v1/completions", json={"prompt": "x", "model": "huge"})
before = replicas()
os.kill(before[0], signal.SIGKILL)
deadline = time.monotonic() + 120
while len(set(replicas()) - {before[0]}) < 2 and time.monotonic() < deadline:
    time.sleep(0.5)
while time.monotonic() < deadline:
    second = shown(asyncio.run(asked(6)))
    if all(error is None for error, *_ in second):
        break
print("RESULT", json.dumps({"models": [entry["id"] for entry in models], "first": first, "second": second,
                            "wrong": [wrong.status_code, wrong.json()["error"]["code"]],
                            "replicas": [len(before), len(replicas())], "new": len(set(replicas()) - set(before))}))
serve.shutdown()
ray.shutdown()
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_replicas_of_ray_serve_answer_and_one_that_dies_is_replaced(tmp_path: Path) -> None:
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed; pip install 'ray[serve]'")
    write_model(tmp_path / "model")
    places = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, places)),
        "OMP_NUM_THREADS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "model"), str(free_port()), str(ROOT / "deploy")]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        out, err = process.communicate(timeout=500)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, err[-4000:]
    result = json.loads(out.split("RESULT", 1)[1].splitlines()[0])  # Ray writes there too
    assert result["models"] == ["tiny"]
    for records in (result["first"], result["second"]):
        assert [record[:2] for record in records] == [[None, 20]] * 6
    assert result["wrong"] == [404, "model_not_found"]
    assert result["replicas"] == [2, 2]
    assert result["new"] == 1
