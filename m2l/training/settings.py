"""What a training run is asked to do: a validated value, the same whoever asks for it."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from m2l.errors import ConfigError, UnknownNameError
from m2l.models import Execution
from m2l.training import optimizers


def check_types(settings: Any) -> None:
    """Refuses a dataclass whose fields are not of their declared plain types.

    An int stands for a float; nothing else is converted.

    Raises:
        ConfigError: naming the setting, what it should be and what it is.
    """
    for field in dataclasses.fields(settings):
        value, wanted = getattr(settings, field.name), field.type
        if wanted is float and type(value) is int:
            object.__setattr__(settings, field.name, float(value))
        elif wanted in (bool, int, float, str) and type(value) is not wanted:
            raise ConfigError(
                f"{type(settings).__name__}.{field.name}: expected {wanted.__name__}, "
                f"found {value!r}; correct it in the gin file or flag"
            )


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """One training run, apart from its model and where it starts.

    Attributes:
        mixture: The seqio task or mixture to train on.
        steps: Optimizer steps in all.
        batch_size: Rows in a batch, over all devices; a packed row holds several examples.
        input_length: Tokens in a row's inputs; longer inputs are cut.
        target_length: Tokens in a row's targets.
        learning_rate: The peak learning rate.
        schedule: "constant" or "cosine", each after `warmup_steps` of linear rise.
        warmup_steps: Steps of that rise.
        optimizer: "adafactor".
        dropout_rate: The dropout rate in training, in place of the model's own.
        dtype: The dtype to compute in; parameters are float32.
        attention: "auto", or one of `models.attention.IMPLEMENTATIONS`.
        remat: "none", "full" or "dots": what of a layer is computed again for its gradient.
        scan_layers: Whether layers are compiled once and scanned over.
        loss_chunk: Positions of a row whose logits are held at a time; 0: all.
        fsdp: Devices over which parameters are split, as well as rows of the batch.
        model: Devices over which single matrices are split.
        pack: Several examples to a row.
        seed: Decides the order of the data, the dropout and, from scratch, the first parameters.
        save_every: Steps between checkpoints; the last step is always saved.
        log_every: Steps between lines of metrics.
        keep: How many of the newest checkpoints stay.
    """

    mixture: str
    steps: int
    batch_size: int = 32
    input_length: int = 96
    target_length: int = 32
    learning_rate: float = 1e-3
    schedule: str = "constant"
    warmup_steps: int = 0
    optimizer: str = "adafactor"
    dropout_rate: float = 0.05
    dtype: str = "float32"
    attention: str = "auto"
    remat: str = "none"
    scan_layers: bool = False
    loss_chunk: int = 0
    fsdp: int = 1
    model: int = 1
    pack: bool = True
    seed: int = 0
    save_every: int = 500
    log_every: int = 20
    keep: int = 1

    def __post_init__(self) -> None:
        check_types(self)
        positive = (
            "steps batch_size input_length target_length fsdp model save_every log_every keep"
        )
        for name in positive.split():
            if (value := getattr(self, name)) < 1:
                raise ConfigError(f"TrainSettings.{name}: expected 1 or more, found {value}")
        if not 0 <= self.dropout_rate < 1:
            raise ConfigError(f"TrainSettings.dropout_rate: {self.dropout_rate} is not in [0, 1)")
        if self.learning_rate <= 0:
            raise ConfigError(f"TrainSettings.learning_rate: {self.learning_rate} is not above 0")
        if not 0 <= self.warmup_steps <= self.steps:
            raise ConfigError(
                f"TrainSettings.warmup_steps: {self.warmup_steps} not in 0 to {self.steps} steps"
            )
        if self.dtype not in ("float32", "bfloat16"):
            raise UnknownNameError("dtype", self.dtype, ["float32", "bfloat16"])
        if self.loss_chunk < 0:
            raise ConfigError(f"TrainSettings.loss_chunk: {self.loss_chunk} is below 0")
        self.execution()
        optimizers.optimizer(self.optimizer)
        optimizers.schedule(self.schedule, peak=1.0, steps=1, warmup_steps=0)

    def execution(self) -> Execution:
        """How the network is computed."""
        dtype = jnp.dtype(self.dtype)
        return Execution(dtype, self.dropout_rate, self.attention, self.remat, self.scan_layers)
