"""The training loop over each backend, its samples and checkpoints; a run broken off in one goes on in the other."""

import numpy as np
import pytest

from llamita.storage import model_directory
from llamita.workflows.options import resolve
from llamita.workflows.pretrain import PretrainConfig, pretrain
from tests.backend.frameworks import NAMES, make
from tests.training.helpers import Altered, Silence, prepare_stories
from tests.workflows.test_pretrain import settings

STEPS = 6


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepare_stories(tmp_path_factory.mktemp("stories"))


class CutOff(Silence):
    """A display that ends the run with its fourth update."""

    def update(self, record):
        if record["step"] == 4:
            raise ConnectionError


def run(config, backend, display=None):
    display = display or Silence()
    return pretrain(config, Altered(backend=backend), display=display), display


@pytest.mark.medium
def test_a_run_of_either_backend_goes_on_in_the_other(tmp_path, data):
    config = {"steps": STEPS, "evaluate_every": 3, "checkpoint_every": 3, "dropout": 0.0, "epsilon": 1e-6}
    backends = {name: make(name).backend for name in NAMES}
    whole = {}
    for name, backend in backends.items():
        result, display = run(settings(tmp_path / name, data, **config), backend)
        assert result.step == STEPS
        assert len(display.evaluations) == 2
        assert (
            "sample" in (tmp_path / name / "samples.txt").read_text()
            or (tmp_path / name / "samples.txt").stat().st_size
        )
        whole[name] = model_directory.load_tensors(tmp_path / name / "last")
    for begun, other in (("mlx", "torch"), ("torch", "mlx")):
        broken = tmp_path / f"begun on {begun}"
        with pytest.raises(ConnectionError):
            run(settings(broken, data, **config), backends[begun], CutOff())
        result, display = run(resolve(PretrainConfig, output=broken, resume=True), backends[other])
        assert result.step == STEPS
        assert any(message.startswith(f"{other} was None and is now ") for message in display.messages)
        weights = model_directory.load_tensors(broken / "last")
        for reference in whole.values():
            assert weights.keys() == reference.keys()
            for name, array in reference.items():
                np.testing.assert_allclose(weights[name].to_numpy(), array.to_numpy(), rtol=0, atol=1e-4, err_msg=name)
    for name, backend in backends.items():
        assert np.isfinite(backend.load_runner(tmp_path / name).forward([[1, 2, 3]])["logits"]).all()
