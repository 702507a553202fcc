"""llama.cpp's own tests of its server, run as they are against `llamita serve`.

    LLAMA_CPP=../llama.cpp make test-slow PYTEST_ARGS=tests/peers

LLAMA_CPP is a checkout. What passes is counted here; docs/compatibility.md says why the rest cannot. What a model with
random weights writes is of no consequence for these.
"""

import os
import socket
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

import pytest

from llamita.backend.torch.infer.runner import TorchRunner
from llamita.backend.torch.model.weights import build_model
from llamita.data import meadow
from llamita.inference.llm import LLM
from llamita.model.presets import preset
from llamita.text import sentencepiece_training
from llamita.text.tokenizer import Tokenizer

PASSING: dict[str, dict[str, int]] = {
    "test_tokenize.py": {"test_tokenize_detokenize": 1, "test_tokenize_with_bos": 1, "test_tokenize_with_pieces": 1},
    "test_basic.py": {"test_server_start_simple": 1, "test_server_models": 1},
    "test_chat_completion.py": {
        "test_completion_with_response_format": 7,
        "test_completion_with_json_schema": 2,
        "test_completion_with_grammar": 2,
        "test_completion_with_invalid_grammar": 1,
        "test_invalid_chat_completion_req": 7,
        "test_logprobs": 1,
        "test_logit_bias": 1,
    },
    "test_embedding.py": {
        "test_embedding_single": 1,
        "test_embedding_multiple": 1,
        "test_embedding_multiple_with_fa": 1,
        "test_embedding_mixed_input": 5,
        "test_embedding_pooling_mean": 1,
        "test_embedding_pooling_mean_multiple": 1,
        "test_embedding_openai_library_single": 1,
        "test_embedding_openai_library_multiple": 1,
        "test_same_prompt_give_same_result": 1,
        "test_embedding_openai_library_base64": 1,
    },
    "test_security.py": {
        "test_access_public_endpoint": 1,
        "test_incorrect_api_key": 2,
        "test_openai_library_correct_api_key": 1,
        "test_local_media_file": 1,
    },
    "test_template.py": {"test_reasoning": 3, "test_add_generation_prompt": 2},
    "test_compat_oai_responses.py": {"test_responses_stream_with_openai_library": 1},
    "test_compat_anthropic.py": {
        "test_anthropic_messages_basic": 1,
        "test_anthropic_messages_with_system": 1,
        "test_anthropic_messages_multipart_content": 1,
        "test_anthropic_messages_conversation": 1,
        "test_anthropic_messages_streaming": 1,
        "test_anthropic_count_tokens": 1,
        "test_anthropic_count_tokens_with_system": 1,
        "test_anthropic_count_tokens_no_max_tokens": 1,
        "test_anthropic_tool_result": 1,
        "test_anthropic_tool_result_with_text": 1,
        "test_anthropic_tool_result_error": 1,
        "test_anthropic_stop_sequences": 1,
        "test_anthropic_temperature": 1,
        "test_anthropic_top_p": 1,
        "test_anthropic_top_k": 1,
        "test_anthropic_missing_messages": 1,
        "test_anthropic_metadata": 1,
        "test_anthropic_vs_openai_different_response_format": 1,
        "test_anthropic_thinking_history_in_count_tokens": 1,
        "test_anthropic_thinking_history_in_template": 1,
    },
}
"""Cases of each test that pass, by file."""
HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TESTS = Path("tools/server/tests")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def suite() -> Path:
    checkout = os.environ.get("LLAMA_CPP")
    if not checkout:
        pytest.skip("LLAMA_CPP names no checkout of llama.cpp")
    for package in ("wget", "requests"):
        pytest.importorskip(package, reason=f"llama.cpp's tests need the package {package}")
    return Path(checkout).resolve() / TESTS


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the shape of llama2.c's stories260K: 512 pieces of SentencePiece, here with random weights."""
    codec = sentencepiece_training.train(meadow.corpus(0, 2000, "train"), 512, ("<unk>", "<s>", "</s>"))
    config = preset("stories-260k", max_position_embeddings=2048)
    place = tmp_path_factory.mktemp("stories") / "model"
    LLM(TorchRunner(build_model(config, seed=0)), Tokenizer.from_codec(codec)).save(place)
    return place


@pytest.mark.parametrize("file", PASSING)
def test_what_passes(file: str, suite: Path, model: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    arguments = ["-p", "llama_cpp_plugin", "-p", "no:cacheprovider", f"--junitxml={report}", f"unit/{file}"]
    environment = {
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(HERE), os.environ.get("PYTHONPATH", "")]),
        "LLAMITA_PEER_MODEL": str(model),
        "LLAMA_SERVER_BIN_PATH": str(HERE / "llama_server.py"),
        "PORT": str(free_port()),
        "TMPDIR": str(tmp_path),
    }
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "--quiet", "--timeout", "120", *arguments],
        cwd=suite, env=os.environ | environment, capture_output=True, text=True,
    )  # fmt: skip
    assert report.exists(), ran.stdout[-2000:] + ran.stderr[-2000:]
    passed = Counter(
        case.attrib["name"].partition("[")[0]
        for case in ElementTree.parse(report).iter("testcase")
        if all(part.tag not in ("failure", "error", "skipped") for part in case)
    )
    fewer = {name: (passed[name], count) for name, count in PASSING[file].items() if passed[name] < count}
    assert not fewer, f"passed fewer than of before (now, before): {fewer}\n{ran.stdout[-4000:]}"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
