"""The settings of a training run: validated, and the same whoever sets them."""

import dataclasses
import inspect
from collections.abc import Mapping
from dataclasses import field, fields

import jax.numpy as jnp

from m2l.errors import ConfigError, UnknownNameError
from m2l.models import Execution
from m2l.models.fields import NOT_NEGATIVE, POSITIVE, check_choice, check_fields
from m2l.training.lora import Lora
from m2l.training.optimizers import SCHEDULES, Optimizer
from m2l.training.state import Objective

_DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """One training run, apart from its model and the checkpoint it starts from.

    In gin files, in run.json and in manifests the settings are flat: those of `optimizer`,
    `objective` and `execution` are named on their own (see `flat` and `from_flat`).

    Attributes:
        mixture: The seqio task or mixture to train on.
        steps: Optimizer steps in all.
        batch_size: Rows in a batch, over all devices; a packed row holds several examples.
        input_length: Tokens in a row's inputs; longer inputs are cut.
        target_length: Tokens in a row's targets.
        learning_rate: The peak learning rate.
        schedule: "constant", "cosine", "linear" or "rsqrt", after `warmup_steps` of linear rise.
        warmup_steps: Steps of that rise.
        optimizer: The optimizer and its settings.
        objective: What is minimised, and in how many parts a batch is processed.
        execution: How the network is computed; parameters are float32 whatever its dtype.
        fsdp: Devices over which parameters are split, as well as rows of the batch.
        model: Devices over which single matrices are split.
        pack: Several examples to a row.
        seed: Decides the order of the data, the dropout and, from scratch, the first parameters.
        save_every: Steps between checkpoints; the last step is always saved.
        log_every: Steps between lines of metrics.
        keep: How many of the newest checkpoints stay. If the newest is damaged, a run resumes from
            the one before it.
        keep_every: Checkpoints of steps that are multiples of this stay as well; 0: none.
        validation: The task or mixture whose validation split is evaluated by; "": none.
        evaluate_every: Steps between evaluations.
        validation_batches: Batches of an evaluation, the same ones each time.
        patience: Evaluations without improvement after which the run stops; 0: it does not.
        minimum_improvement: What the validation loss must fall by to count as improved.
        keep_best: Whether the checkpoint of the lowest validation loss stays too, and is the one
            that the finished run is left with.
        export_dtype: "float32" or "bfloat16": a finished run's parameters are written in it, alone,
            to RUN/exported; "": they are not. Of an adapter, the dtype of RUN/adapter.
        lora: An adapter that is trained beside the model, which stays as it is, as
            "r=16,alpha=32,targets=q_proj+v_proj"; "": none.

    Raises:
        ConfigError, UnknownNameError: A setting of the wrong type or out of range.
    """

    mixture: str
    steps: int
    batch_size: int = 32
    input_length: int = 96
    target_length: int = 32
    learning_rate: float = field(default=1e-3, metadata=POSITIVE)
    schedule: str = "constant"
    warmup_steps: int = field(default=0, metadata=NOT_NEGATIVE)
    optimizer: Optimizer = Optimizer()  # noqa: RUF009, frozen
    objective: Objective = Objective()  # noqa: RUF009, frozen
    execution: Execution = Execution(dropout_rate=0.05)  # noqa: RUF009, frozen
    fsdp: int = 1
    model: int = 1
    pack: bool = True
    seed: int = field(default=0, metadata={"least": -(2**63), "most": 2**63 - 1})
    save_every: int = 500
    log_every: int = 20
    keep: int = 2
    keep_every: int = field(default=0, metadata=NOT_NEGATIVE)
    validation: str = ""
    evaluate_every: int = 100
    validation_batches: int = 8
    patience: int = field(default=0, metadata=NOT_NEGATIVE)
    minimum_improvement: float = field(default=0.0, metadata=NOT_NEGATIVE)
    keep_best: bool = False
    export_dtype: str = ""
    lora: str = ""

    def __post_init__(self) -> None:
        check_fields(self)
        check_choice(self, "schedule", SCHEDULES)
        check_choice(self, "export_dtype", ("", *_DTYPES))
        if self.warmup_steps > self.steps:
            raise ConfigError(
                f"TrainSettings.warmup_steps: {self.warmup_steps} not in 0 to {self.steps} steps"
            )
        if self.execution.dtype not in map(jnp.dtype, _DTYPES):
            raise UnknownNameError("dtype", str(self.execution.dtype), _DTYPES)
        if self.batch_size % self.objective.accumulate:
            raise ConfigError(
                f"TrainSettings.accumulate: {self.objective.accumulate} does not divide the "
                f"batch_size {self.batch_size}"
            )
        if self.keep_every and (self.save_every <= 0 or self.keep_every % self.save_every):
            raise ConfigError(
                f"TrainSettings.keep_every: {self.keep_every} is no multiple of save_every, "
                f"{self.save_every}: of steps that are not saved nothing can be kept"
            )
        if (self.patience or self.keep_best) and not self.validation:
            raise ConfigError("TrainSettings: patience and keep_best need a validation mixture")
        self.adapter  # noqa: B018 (whose text it checks)

    @property
    def adapter(self) -> Lora | None:
        """The adapter that is trained; None: the model itself is."""
        return Lora.parse(self.lora) if self.lora else None

    @property
    def lengths(self) -> dict[str, int]:
        """The longest inputs and targets, as in seqio."""
        return {"inputs": self.input_length, "targets": self.target_length}

    def flat(self) -> dict[str, object]:
        """Returns every setting as a plain JSON value, those of the groups under their own names.

        `from_flat` reads it.
        """
        flat = _flattened({name: getattr(self, name) for name in _DEFAULTS})
        return {n: value for n, value in flat.items() if n not in _LATER or value != _LATER[n]}


# Settings that came later are told where they change something: older runs are gone on with, and
# what is known by its settings stays known.
_LATER = {"keep_every": 0, "ema": 0.0, "lora": ""}
_GROUPS = {"optimizer": Optimizer, "objective": Objective, "execution": Execution}
_FLAT_NAMES = {"name": "optimizer"}
_DEFAULTS = {setting.name: setting.default for setting in fields(TrainSettings)}


def _flattened(settings: Mapping[str, object]) -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in settings.items():
        if name not in _GROUPS:
            flat[name] = value
            continue
        for part, setting in dataclasses.asdict(value).items():
            flat[_FLAT_NAMES.get(part, part)] = str(setting) if part == "dtype" else setting
    return flat


def from_flat(**settings: object) -> TrainSettings:
    """Builds the settings from flat ones, as gin's `Train.NAME` and run.json name them.

    Raises:
        ConfigError, UnknownNameError: A setting of the wrong type or out of range.
    """
    groups = {}
    for name, group in _GROUPS.items():
        names = {part.name: _FLAT_NAMES.get(part.name, part.name) for part in fields(group)}
        changes = {part: settings.pop(key) for part, key in names.items() if key in settings}
        groups[name] = dataclasses.replace(_DEFAULTS[name], **changes)
    return TrainSettings(**groups, **settings)


# gin reads the names and the defaults from it.
from_flat.__signature__ = inspect.Signature(
    [
        inspect.Parameter(
            name,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=inspect.Parameter.empty if default is dataclasses.MISSING else default,
        )
        for name, default in _flattened(_DEFAULTS).items()
    ]
)


def on_mixture(settings: TrainSettings, mixture: str, validation: str = "") -> TrainSettings:
    """Returns training settings for a mixture; with a validation, for the best checkpoint.

    Args:
        settings: The settings; any `validation` stands for the mixture's.
        mixture: What is trained on.
        validation: What is validated on; "": the mixture.
    """
    validation = (validation or mixture) if settings.validation else ""
    return dataclasses.replace(
        settings, mixture=mixture, validation=validation, keep_best=bool(validation)
    )


def with_steps(settings: TrainSettings, steps: int, warmup: float = 0.0) -> TrainSettings:
    """Returns training settings for so many steps, this share of them to warm up; 0: as set."""
    rise = round(warmup * steps) if warmup else min(settings.warmup_steps, steps)
    return dataclasses.replace(settings, steps=steps, warmup_steps=rise)
