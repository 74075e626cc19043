"""What a training run is asked to do: a validated value, the same whoever asks for it."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from m2l.errors import ConfigError, UnknownNameError
from m2l.models import Execution
from m2l.training import optimizers
from m2l.training.state import Objective


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
        schedule: "constant", "cosine", "linear" or "rsqrt", after `warmup_steps` of linear rise.
        warmup_steps: Steps of that rise.
        optimizer: "adafactor", "adamw" or "sgd"; see `optimizers.Optimizer` for the next six.
        weight_decay: AdamW's.
        beta1: AdamW's.
        beta2: AdamW's.
        momentum: SGD's.
        clip: The largest norm of the gradient; 0: any.
        freeze: Regular expressions of names of parameters that keep their values.
        z_loss: z of z log(Z)^2, added to the loss of each target; T5's pretraining had 1e-4.
        label_smoothing: What of each target is spread over the vocabulary.
        accumulate: In how many parts, one after the other, a batch is taken.
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
        keep: How many of the newest checkpoints stay. The one before the newest is what a run
            goes on from if the newest turns out damaged.
        validation: The task or mixture whose validation split is evaluated by; "": none.
        evaluate_every: Steps between evaluations.
        validation_batches: Batches of an evaluation, the same ones each time.
        patience: Evaluations without improvement after which the run stops; 0: it does not.
        minimum_improvement: What the validation loss must fall by to count as improved.
        keep_best: Whether the checkpoint of the lowest validation loss stays too, and is the one
            that the finished run is left with.
        export_dtype: "float32" or "bfloat16": a finished run's parameters are written in it, alone,
            to RUN/exported; "": they are not.
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
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    momentum: float = 0.0
    clip: float = 0.0
    freeze: tuple[str, ...] = ()
    z_loss: float = 0.0
    label_smoothing: float = 0.0
    accumulate: int = 1
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
    keep: int = 2
    validation: str = ""
    evaluate_every: int = 100
    validation_batches: int = 8
    patience: int = 0
    minimum_improvement: float = 0.0
    keep_best: bool = False
    export_dtype: str = ""

    def __post_init__(self) -> None:
        check_types(self)
        _as_patterns(self)
        positive = (
            "steps batch_size input_length target_length fsdp model save_every log_every keep "
            "accumulate evaluate_every validation_batches"
        )
        for name in positive.split():
            if (value := getattr(self, name)) < 1:
                raise ConfigError(f"TrainSettings.{name}: expected 1 or more, found {value}")
        for name in ("dropout_rate", "label_smoothing"):
            if not 0 <= (value := getattr(self, name)) < 1:
                raise ConfigError(f"TrainSettings.{name}: {value} is not in [0, 1)")
        for name in ("loss_chunk", "z_loss", "patience", "minimum_improvement"):
            if (value := getattr(self, name)) < 0:
                raise ConfigError(f"TrainSettings.{name}: {value} is below 0")
        if self.learning_rate <= 0:
            raise ConfigError(f"TrainSettings.learning_rate: {self.learning_rate} is not above 0")
        if not 0 <= self.warmup_steps <= self.steps:
            raise ConfigError(
                f"TrainSettings.warmup_steps: {self.warmup_steps} not in 0 to {self.steps} steps"
            )
        if self.dtype not in ("float32", "bfloat16"):
            raise UnknownNameError("dtype", self.dtype, ["float32", "bfloat16"])
        if self.export_dtype not in ("", "float32", "bfloat16"):
            raise UnknownNameError("export_dtype", self.export_dtype, ["float32", "bfloat16"])
        if self.batch_size % self.accumulate:
            raise ConfigError(
                f"TrainSettings.accumulate: {self.accumulate} does not divide the batch_size "
                f"{self.batch_size}"
            )
        if (self.patience or self.keep_best) and not self.validation:
            raise ConfigError("TrainSettings: patience and keep_best need a validation mixture")
        self.execution()
        self.optimization()
        optimizers.schedule(self.schedule, peak=1.0, steps=1, warmup_steps=0)

    def execution(self) -> Execution:
        """How the network is computed."""
        dtype = jnp.dtype(self.dtype)
        return Execution(dtype, self.dropout_rate, self.attention, self.remat, self.scan_layers)

    def optimization(self) -> optimizers.Optimizer:
        """The optimizer."""
        return optimizers.Optimizer(
            *(self.optimizer, self.weight_decay, self.beta1, self.beta2),
            *(self.momentum, self.clip, self.freeze),
        )

    def objective(self) -> Objective:
        """What is minimised."""
        return Objective(self.loss_chunk, self.z_loss, self.label_smoothing, self.accumulate)


def _as_patterns(settings: TrainSettings) -> None:
    freeze = settings.freeze
    if not isinstance(freeze, list | tuple) or not all(isinstance(name, str) for name in freeze):
        raise ConfigError(f"TrainSettings.freeze: expected a list of patterns, found {freeze!r}")
    object.__setattr__(settings, "freeze", tuple(freeze))
