"""`--with DIRECTORY` as typed: graded first, refused by name; then the reader's code in the place of the library's."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient

from llamita.backend.choice import load_backend
from llamita.backend.torch.own.backend import OwnBackend
from llamita.backend.torch.pickles import read_pickle, write_pickle
from llamita.cli.main import main
from llamita.data import meadow
from llamita.data.prepare import PrepareConfig, prepare
from llamita.learn import course, own_model, track
from llamita.learn.own_model import TRACKS, ReadersProgram, checked_program
from llamita.learn.track import sources_of
from llamita.model.config import ModelConfig
from llamita.server.app import create_app
from llamita.server.model import open_model
from llamita.server.settings import ServerLimits
from llamita.storage import model_directory
from llamita.text.bpe import train_bpe_from_iterator
from llamita.workflows.convert import Tools

TRACK, SERVING, NUMPY = (track.find(name) for name in ("min-llama", "serving", "numpy"))
CONFIG = ModelConfig(300, 32, 48, 2, 4, 2, 64, rope_theta=700.0, eos_token_id=None)
TRAIN = ["--steps", "4", "--batch-size", "4", "--evaluate-every", "2", "--evaluation-rows", "8", "--device", "cpu"]
pytestmark = pytest.mark.usefixtures("graded_at_once")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with its tokenizer, prepared data, and folders of courses: one with everything solved, and those of the
    tracks `serving` and `numpy` with the lessons up to the cache solved; without figures, which take seconds."""
    patch = pytest.MonkeyPatch()
    patch.setattr(course, "drawn", lambda track: {})
    directory = tmp_path_factory.mktemp("world")
    base = directory / "base"
    base.mkdir()
    train_bpe_from_iterator(meadow.corpus(0, 100, "train"), 300).save(base)
    backend = load_backend("torch", device="cpu")
    model_directory.save_config(base, CONFIG)
    model_directory.save_tensors(base, backend.build_train_step(CONFIG, seed=1, device="cpu").weights())
    prepare(PrepareConfig(output=directory / "data", tokenizer=base, source="meadow", documents=60))
    plain = directory / "plain"
    shutil.copytree(base, plain)
    values = json.loads((plain / "config.json").read_text())
    values["rope_theta"] = 10000.0
    values.pop("rope_parameters", None)
    (plain / "config.json").write_text(json.dumps(values))
    course.start(directory / "own", TRACK, "torch", plain, 1, Tools(backend, read_pickle, write_pickle))
    for name, text in TRACK.solutions("torch").items():
        (directory / "own" / name).write_text(text, "utf-8")
    server = directory / "server"
    course.start(server, SERVING, "torch", plain, 1, Tools(backend, read_pickle, write_pickle))
    for name in ("basics", "attention", "positional_encoding", "layers", "model", "kv_cache"):
        (server / f"{name}.py").write_text(SERVING.solutions("torch")[f"{name}.py"], "utf-8")
    course.start(directory / "numpy", NUMPY, "numpy", plain, 1, Tools(backend, read_pickle, write_pickle))
    for name in ("functions", "rope", "attention", "weights", "llama", "cache", "generate"):
        (directory / "numpy" / f"{name}.py").write_text(NUMPY.solutions("numpy")[f"{name}.py"], "utf-8")
    patch.undo()
    return directory


@pytest.fixture
def own(world: Path, tmp_path: Path) -> Path:
    """A solved folder of this test's own."""
    return Path(shutil.copytree(world / "own", tmp_path / "own"))


@pytest.fixture
def server(world: Path, tmp_path: Path) -> Path:
    """A folder of the track `serving` of this test's own."""
    return Path(shutil.copytree(world / "server", tmp_path / "server"))


@pytest.fixture(scope="module", params=["min-llama", "serving", "numpy"])
def backend(request: pytest.FixtureRequest, world: Path) -> OwnBackend:
    """The code of a solved folder, which was not graded."""
    directory = (world / {"min-llama": "own", "serving": "server", "numpy": "numpy"}[request.param]).resolve()
    names = TRACKS[request.param].modules
    return OwnBackend(ReadersProgram(directory, request.param, names, sources_of(directory.glob("*.py"))))


@pytest.fixture
def graded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out the grader, which other tests here have judge the same files, and which takes seconds."""
    monkeypatch.setattr(own_model, "grade", lambda *arguments: iter(()))


def change(own: Path, file: str, old: str, new: str) -> None:
    text = (own / file).read_text("utf-8")
    assert text.count(old) == 1
    (own / file).write_text(text.replace(old, new), "utf-8")


def told_of_the_same_story(world: Path, folder: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What the command says beside a greedy story that is the same with a folder's code and without."""
    command = ["generate", str(world / "base"), "Once", "--temperature", "0", "--max-tokens", "40", "--device", "cpu"]
    assert main(command) == 0
    expected = capsys.readouterr().out
    assert main([*command, "--with", str(world / folder), "--statistics"]) == 0
    found = capsys.readouterr()
    assert found.out == expected
    assert len(expected) > 40
    return found.err


@pytest.mark.medium
def test_the_same_greedy_story_comes_from_the_readers_code(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = told_of_the_same_story(world, "own", capsys)
    assert f"the checks pass: running the code in {world / 'own'}" in told
    assert "the course's code, which reads the whole text again for each token" in told


def test_the_library_may_guess_for_the_readers_code(
    world: Path, capsys: pytest.CaptureFixture[str], graded: None
) -> None:
    command = ["generate", str(world / "base"), "Once", "--temperature", "0", "--max-tokens", "20", "--device", "cpu"]
    texts = []
    for draft in ([], ["--draft", "lookup"], ["--draft", str(world / "base")]):
        assert main([*command, "--with", str(world / "own"), *draft]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] == texts[2]


def test_a_wrong_line_is_refused_with_its_mistakes_name(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(own, "llama.py", " / math.sqrt(self.head_dim)", "")
    assert main(["generate", str(own), "--with", str(own)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"error: {own}: lesson attention: Attention.compute_query_key_value_scores is wrong: result[0, 0, 1, 0] is "
    )
    assert "; the scale is left out (see Vaswani et al. 2017, " in line


@pytest.mark.medium
def test_a_model_with_a_cache_writes_the_same_story(
    server: Path, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The lesson batching may be missing, and is used where it is written, if it is right."""
    command = ["generate", str(world / "base"), "Once", "--temperature", "0", "--max-tokens", "40", "--device", "cpu"]
    assert main(command) == 0
    expected = capsys.readouterr().out
    ways = []
    for more in ([], ["--draft", "lookup"]):
        assert main([*command, "--with", str(server), "--statistics", *more]) == 0
        found = capsys.readouterr()
        assert found.out == expected
        ways.append(found.err)
        (server / "batch.py").write_text(SERVING.solutions("torch")["batch.py"], "utf-8")
    assert "its cache, sequences one after the other (the lesson batching is not written);" in ways[0]
    assert "its cache, sequences together;" in ways[1]
    assert main([*command, "--with", str(server), "--draft", str(world / "base")]) == 0
    assert capsys.readouterr().out == expected
    change(server, "batch.py", "torch.arange(S) <= positions", "torch.arange(S) < positions")
    assert main([*command, "--with", str(server)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {server}: lesson batching: BatchKvCache.update_and_fetch is wrong: ")
    assert "a position does not see itself (see Yu et al. 2022, Orca" in line


@pytest.mark.medium
def test_a_model_in_numpy_writes_the_same_story(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "its cache, sequences one after the other;" in told_of_the_same_story(world, "numpy", capsys)


def test_a_wrong_cache_is_refused_with_its_mistakes_name(server: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(server, "kv_cache.py", "self.offset += key.shape[2]", "self.offset += 1")
    assert main(["generate", str(server / "model"), "--with", str(server)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {server}: lesson cache: KvCache.update_and_fetch is wrong: ")
    assert "the offset counts calls, not positions (see Shazeer 2019" in line


def test_what_a_track_has_no_part_for_is_refused(server: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for verb, does in (
        (["train", "--data", "none", "--preset", "tiny", "--output", "run"], "train"),
        (["classify", "train", "--data", "none", "--model", "none", "--output", "run"], "train a classifier"),
        (["classify", "predict", "none", "--text", "Hm."], "label texts"),
    ):
        assert main([*verb, "--with", str(server)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        why, end = "it has no optimiser and no classifier", "give the folder of min-llama, or leave --with out"
        assert line == f"error: {server} is the course serving, which cannot {does}: {why}; {end}"
    (server / "course.json").write_text('{"track": "serving", "framework": "mlx"}')
    assert main(["generate", str(server / "model"), "--with", str(server)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(
        "is the course serving in mlx, whose code is no model that --with can run; give the folder of "
        "min-llama (torch), serving (torch), numpy (numpy)"
    )


@pytest.mark.medium
def test_only_what_is_run_has_to_be_right(own: Path) -> None:
    """The choice of the next token is the library's, and a generated text needs no AdamW."""
    (own / "optimizer.py").write_text(TRACK.skeletons("torch")["optimizer.py"], "utf-8")
    change(own, "llama.py", "idx_next = logits.argmax(dim=-1, keepdim=True)", "raise NotImplementedError")
    program = checked_program(own, "generate")
    assert program.directory == own.resolve()
    with pytest.raises(ValueError, match=r"own: lesson optimizer: AdamW\.step is not yet written; llamita learn show"):
        checked_program(own, "classify train")


def test_what_is_not_written_fails_or_is_no_course_is_said_in_a_line(own: Path, tmp_path: Path) -> None:
    change(own, "rope.py", "frequencies = theta **", "frequencies = tetha **")
    with pytest.raises(ValueError, match=r"lesson rotary: apply_rotary_emb fails: NameError: .* \(rope.py, line \d+: "):
        checked_program(own, "generate")
    with pytest.raises(ValueError, match="is no course"):
        checked_program(tmp_path, "generate")
    (own / "course.json").write_text('{"track": "min-llama", "framework": "torch"}')
    (own / "rope.py").write_text(TRACK.skeletons("torch")["rope.py"], "utf-8")
    with pytest.raises(ValueError, match="lesson rotary: apply_rotary_emb is not yet written"):
        checked_program(own, "generate")


def test_mlx_runs_no_code_of_pytorchs(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(own), "--with", str(own), "--backend", "mlx"]) == 2
    assert "leave --backend mlx" in capsys.readouterr().err


@pytest.mark.medium
def test_a_run_trains_the_readers_model_and_goes_on_with_it(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], graded: None
) -> None:
    shape = ["--set", "hidden_size=32", "intermediate_size=48", "num_hidden_layers=2", "--sample-tokens", "4"]
    options = ["--data", str(world / "data"), "--preset", "tiny", *shape, *TRAIN, "--precision", "fp32"]
    losses = {}
    for name, more in (("library", []), ("own", ["--with", str(world / "own")])):
        assert main(["train", *options, "--output", str(tmp_path / name), *more]) == 0
        records = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses[name] = [record["loss"] for record in records]
    assert len(losses["own"]) == 6  # four updates, two evaluations
    np.testing.assert_allclose(losses["own"], losses["library"], rtol=1e-4)
    assert losses["own"][3] < losses["own"][0]
    capsys.readouterr()
    assert main(["train", "--output", str(tmp_path / "own"), "--resume"]) == 0  # nothing is left to do, by their code
    assert f"running the code in {world / 'own'}" in capsys.readouterr().err
    prompt = ["--prompt-tokens", "5", "--temperature", "0", "--max-tokens", "12", "--device", "cpu"]
    assert main(["generate", str(tmp_path / "own"), *prompt]) == 0  # an ordinary model


@pytest.mark.medium
def test_a_classifier_learns_and_labels_by_the_readers_code(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], graded: None
) -> None:
    lines = [f"{i % 2} ||| He was {('sad', 'happy')[i % 2]} {i} ." for i in range(24)]
    data = tmp_path / "train.txt"
    data.write_text("\n".join(lines) + "\n")
    learn = ["--data", str(data), "--validation", str(data), "--model", str(world / "base"), *TRAIN]
    more = ["--steps", "30", "--learning-rate", "0.01", "--evaluate-every", "30", "--evaluation-rows", "24"]
    run, code = tmp_path / "run", ["--with", str(world / "own")]
    assert main(["classify", "train", *learn, *more, "--output", str(run), *code]) == 0
    assert "best validation accuracy 1.0000" in capsys.readouterr().out
    asked = ["classify", "predict", str(run), "--text", "He was happy 3 .", "--device", "cpu"]
    assert main(asked) == 0
    expected = capsys.readouterr().out
    assert main([*asked, *code]) == 0
    assert capsys.readouterr().out == expected
    assert expected.startswith("1  0.9")


def test_a_server_answers_by_the_readers_code(world: Path, backend: OwnBackend) -> None:
    options = {"dtype": "auto", "device": "cpu", "threads": 0, "exact": False, "draft": "", "engine": None}
    answers = []
    for chosen in (backend, "torch"):
        model = open_model(world / "base", name="m", adapters={}, backend=chosen, **options)
        with TestClient(create_app(model, ServerLimits()), base_url="http://localhost") as client:
            asked = {"model": "m", "messages": [{"role": "user", "content": "Who came?"}], "temperature": 0}
            reply = client.post("/v1/chat/completions", json=asked | {"max_tokens": 12})
            assert reply.status_code == 200, reply.text
            answers.append(reply.json()["choices"][0]["message"]["content"])
            vectors = client.post("/v1/embeddings", json={"model": "m", "input": ["Ned sat by the gate ."]})
            answers.append(vectors.json()["data"][0]["embedding"])
    assert answers[0] == answers[2]
    assert answers[0]
    np.testing.assert_allclose(answers[1], answers[3], atol=1e-5)
