"""A tiny run, to be trained, stopped, killed and damaged."""

import pytest

from m2l import tasks
from m2l.data import vocabularies
from m2l.training import loop
from m2l.training.settings import TrainSettings

SETTINGS = TrainSettings(
    mixture="sentiment", steps=6, batch_size=4, learning_rate=0.05, save_every=2, log_every=1
)


@pytest.fixture(scope="session")
def train(tiny_config):
    """Trains the tiny model; returns the last checkpoint."""
    described = vocabularies.describe(vocabularies.load("microworld"), "microworld")

    def run(out, settings=SETTINGS, **kwargs):
        tasks.declare()  # each time: a command run by another test may have put others there
        return loop.train(out, settings=settings, **(run.arguments | kwargs))

    run.arguments = {
        "config": tiny_config,
        "vocabulary": described,
        "data": {"source": "microworld"},
    }
    return run


@pytest.fixture(scope="session")
def whole(train, tmp_path_factory):
    """A run that nothing interrupted."""
    return train(tmp_path_factory.mktemp("whole") / "run")
