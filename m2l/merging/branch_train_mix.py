"""Mixtures of experts made of dense models: each layer routes tokens to the models' MLPs.

What is not in an MLP is averaged, as Branch-Train-MiX does (Sukhbaatar et al. 2024,
arXiv:2403.07816), which trains the mixture then. Routers by hidden states of prompts, which need
no training, are mergekit-moe's `gate_mode`s hidden and hidden_avg.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from m2l import checkpoints, hub_models, models, partitioning, signals, storage
from m2l.checkpoints import Manifest, huggingface, huggingface_directory, opening
from m2l.checkpoints.decoder_families import DECODER_FAMILIES
from m2l.checkpoints.huggingface_config import to_json
from m2l.checkpoints.importing import float_dtype, parameter_shapes
from m2l.checkpoints.opening import HUGGINGFACE, ORBAX, Checkpoint
from m2l.checkpoints.pytrees import StoredArray
from m2l.checkpoints.reading import KEY, existing_result
from m2l.checkpoints.safetensors import StoredTensor
from m2l.checkpoints.saving import writing
from m2l.checkpoints.spans import Span, blocks, in_parallel, read_whole
from m2l.data import layouts, text_tasks, tokenizer_files, vocabularies
from m2l.errors import MergeError, UnknownNameError
from m2l.files import checksum
from m2l.merging import inputs
from m2l.models import Config, LlamaConfig
from m2l.progress import Progress
from m2l.storage import AnyPath, PathLike
from m2l.typing import Json, JsonObject, Params

ROUTERS = ("hidden", "hidden_avg", "random")
SHARED = ("average", "base")

_INIT = 0.02  # the initializer_range of all of them
_ROWS = 8
_EXPERT = "expert_"


class Prompts(NamedTuple):
    """Texts that an expert is to be asked, and where they are from."""

    source: str
    texts: Sequence[str]


def mix(
    base: PathLike,
    experts: Sequence[PathLike],
    out: PathLike,
    *,
    router: str = "hidden",
    prompts: Sequence[Prompts] = (),
    input_length: int = 512,
    seed: int = 0,
    experts_per_token: int = 2,
    shared: str = "average",
    dtype: str | None = None,
    output_format: str | None = None,
    vocabulary: str | None = None,
    allow_differences: Sequence[str] = (),
    mesh: jax.sharding.Mesh | None = None,
) -> Manifest:
    """Makes a mixture of experts of dense models, tensor by tensor.

    Memory: three of the largest tensors with their sums, and of each Hugging Face directory two of
    the tensors that it stores transposed; and the base, on the devices of the mesh, where prompts
    are read.

    Args:
        base: What the experts were trained from; reads the prompts. It is an expert itself only if
            it is among these.
        experts: Models of one family and one shape, of any kind that `opening.open` takes.
        out: The checkpoint or directory to make; must not exist, unless the same call made it.
        router: "hidden": an expert's row of a layer's router is the mean, over its prompts, of
            what the base's layer reads at the last token, divided by its norm; "hidden_avg": the
            same of the mean over a prompt's tokens. "random": drawn, to be trained.
        prompts: Of each expert, for the first two.
        input_length: Tokens of a prompt; longer ones are cut.
        seed: Of a random router.
        experts_per_token: How many experts a token goes through.
        shared: Whose all other parameters are: the experts' "average", or the "base"'s.
        dtype: Of the mixture's parameters; None: the widest of the models'.
        output_format: "orbax" or "huggingface"; None: what all models are, or orbax.
        vocabulary: The tokenizer, where none of the models has one.
        allow_differences: Fields in which the models' descriptions may differ.
        mesh: On which the base reads the prompts; None: of all devices, each with all of it.

    Returns:
        The manifest.

    Raises:
        MergeError: The models do not fit each other, or are of a family without a mixture; experts
            and prompts are not of one number, or prompts are empty; a parameter is not finite.
        ConfigError: More experts per token than experts.
        CheckpointError: A model is missing or damaged, or `out` exists.
        UnknownNameError: There is no such router, dtype or way to share.
    """
    for kind, name, known in (("router", router, ROUTERS), ("shared", shared, SHARED)):
        if name not in known:
            raise UnknownNameError(kind, name, known)
    if not experts:
        raise MergeError("nothing to mix: give at least one expert")
    _check_prompts(router, prompts, len(experts))
    paths = [hub_models.located(path).absolute() for path in (base, *experts)]
    kinds = {opening.kind(path) for path in paths}
    output_format = output_format or (HUGGINGFACE if kinds == {HUGGINGFACE} else ORBAX)
    opened, _ = inputs.open_all(paths, ORBAX, allowed=allow_differences)
    if not opened[0].model:
        raise MergeError(f"{paths[0]}: it does not say which model it is of")
    dense = models.from_dict(opened[0].model)
    config = mixture_of(dense, len(experts), experts_per_token)
    to_json(config, "float32", {})  # Which refuses what no file can express.
    out = storage.path(out).absolute()
    inputs.check_destination(out, [path for each in opened for path in each.paths])
    inputs.check_alike(opened, allow_differences)
    dtypes = [tensor.dtype for each in opened for tensor in each.parameters.values()]
    stored_dtype = float_dtype(dtype or max(dtypes, key=lambda each: each.itemsize))
    options: JsonObject = {
        "experts_per_token": experts_per_token,
        "shared": shared,
        "router": router,
        "dtype": stored_dtype.name,
    }
    options |= {"seed": seed} if router == "random" else {"input_length": input_length}
    described = _vocabulary(opened, vocabulary)
    checkpoints.check_vocabulary(described, config.vocab_size, opened[0].path)
    content = [options, output_format, described, *(each.digest for each in opened)]
    key = checksum([*content, [[*each.texts] for each in prompts]])
    is_directory = output_format == HUGGINGFACE
    marker = huggingface_directory.MANIFEST if is_directory else None
    same = existing_result(out, lambda manifest: manifest.made_by.get(KEY) == key, marker)
    if same is not None:
        return same
    if router == "random":
        draw = np.random.default_rng(seed).normal
        rows_ExLxD = draw(0, _INIT, (len(experts), config.num_hidden_layers, config.hidden_size))
    else:
        rows_ExLxD = _directions(opened[0], dense, prompts, described, router, input_length, mesh)
        options["prompts"] = _about(prompts, rows_ExLxD)
    roles = ["base"] + ["expert"] * len(experts)
    fields = {
        "model": models.to_dict(config),
        "vocabulary": described,
        "made_by": {"kind": "moe", "family": config.model_type, **options, KEY: key},
        "parents": tuple(
            {"role": role, "path": str(each.path), "digest": each.digest}
            for role, each in zip(roles, opened, strict=True)
        ),
    }
    parts = functools.partial(_parts, opened, rows_ExLxD, shared)
    write = functools.partial(_write, config=config, dtype=stored_dtype, parts=parts, fields=fields)
    if not is_directory:
        return write(out)
    between = out.with_name(f".{out.name}.mixed-{key[:16]}")
    if between.exists():  # Of the same call, which was killed.
        checkpoints.remove(between)
    manifest = write(between)
    huggingface.export_checkpoint(between, out)
    checkpoints.remove(between)
    return manifest


def mixture_of(dense: Config, experts: int, experts_per_token: int) -> LlamaConfig:
    """Returns the mixture of so many experts that are models of `dense`.

    The weights of a token's experts sum to 1, so that a mixture of equal experts is that expert.

    Raises:
        MergeError: Its family has no mixture.
        ConfigError: More experts per token than experts, or fewer than one.
    """
    family = DECODER_FAMILIES.get(dense.model_type)
    if not isinstance(dense, LlamaConfig) or family is None or not family.mixture:
        known = ", ".join(name for name, each in DECODER_FAMILIES.items() if each.mixture)
        raise MergeError(
            f"no mixture of experts is made of models of the type {dense.model_type}: expected one "
            f"of {known}"
        )
    return dataclasses.replace(
        dense,
        model_type=family.mixture,
        num_experts=experts,
        num_experts_per_tok=experts_per_token,
        moe_intermediate_size=dense.intermediate_size,
        norm_topk_prob=True,
        router_aux_loss_coef=DECODER_FAMILIES[family.mixture].defaults["router_aux_loss_coef"],
    )


def directions(
    config: LlamaConfig, params: Params, prompts: Sequence[np.ndarray], *, average: bool = False
) -> np.ndarray:
    """Returns the mean of what each layer reads of prompts, divided by its norm: float32 [L, D].

    Args:
        config, params: The model that reads them.
        prompts: The tokens of each, int32.
        average: Whether the mean over a prompt's tokens counts, else its last token. Padding never
            does, unlike in mergekit.
    """
    total_LxD = np.zeros((config.num_hidden_layers, config.hidden_size))
    ordered = sorted(prompts, key=len)
    for start in range(0, len(ordered), _ROWS):
        rows = ordered[start : start + _ROWS]
        # Of few lengths, each of which is compiled for.
        length = 1 << (len(rows[-1]) - 1).bit_length()
        tokens_BxT = np.zeros((_ROWS, length), np.int32)
        weights_BxT = np.zeros((_ROWS, length), np.float32)
        for place, row in enumerate(rows):
            tokens_BxT[place, : len(row)] = row
            counted = len(row) if average else 1
            weights_BxT[place, len(row) - counted : len(row)] = 1 / counted
        total_LxD += np.asarray(_weighted(config, params, tokens_BxT, weights_BxT))
    mean_LxD = total_LxD / len(ordered)
    norms_Lx1 = np.linalg.norm(mean_LxD, axis=1, keepdims=True)
    return (mean_LxD / np.maximum(norms_Lx1, 1e-8)).astype(np.float32)


@functools.partial(jax.jit, static_argnums=0)
def _weighted(
    config: LlamaConfig, params: Params, tokens_BxT: jax.Array, weights_BxT: jax.Array
) -> jax.Array:
    # Attention is causal: what follows a prompt changes nothing before it.
    states = models.layer_inputs(config, params, {"decoder_input_tokens": tokens_BxT})
    sums = [jnp.einsum("btd,bt->d", x, weights_BxT, precision="highest") for x in states]
    return jnp.stack(sums)


def _check_prompts(router: str, prompts: Sequence[Prompts], experts: int) -> None:
    if router == "random":
        if prompts:
            raise MergeError("a random router looks at no prompts: leave them out")
        return
    if len(prompts) != experts:
        raise MergeError(
            f"{len(prompts)} prompts for {experts} experts: a router by hidden states needs "
            "prompts of each expert, in the order of the experts"
        )
    for each in prompts:
        if not any(text.strip() for text in each.texts):
            raise MergeError(f"{each.source}: there is no prompt in it")


def _vocabulary(opened: Sequence[Checkpoint], name: str | None) -> dict[str, Json]:
    """Returns the vocabulary, as the experts read it."""
    for each in [] if name is not None else [*opened[1:], opened[0]]:
        if each.vocabulary is not None:
            return dict(each.vocabulary)
        if each.tokenizer is not None:
            return tokenizer_files.describe(str(each.tokenizer))
    if name is None:
        raise MergeError(f"{opened[0].path}: it has no tokenizer: name one with --vocabulary")
    return tokenizer_files.describe(name)


def _directions(
    base: Checkpoint,
    config: LlamaConfig,
    prompts: Sequence[Prompts],
    vocabulary: dict[str, Json],
    router: str,
    input_length: int,
    mesh: jax.sharding.Mesh | None,
) -> np.ndarray:
    """Returns every expert's directions, [E, L, D]."""
    loaded = vocabularies.load(vocabulary["name"])
    layout = layouts.of(config, loaded)
    rows = []
    for each in prompts:
        texts = [text for text in each.texts if text.strip()]
        encoded = text_tasks.encode(loaded, texts, each.source)
        rows.append([np.append(*layout.prompt(ids[:input_length])) for ids in encoded])
    mesh = mesh or partitioning.make_mesh()
    shardings = checkpoints.flatten(partitioning.shardings(models.spec(config), mesh))
    with jax.set_mesh(mesh):
        params = checkpoints.unflatten(
            {name: jax.device_put(_read(base, name), shardings[name]) for name in shardings}
        )
        result, average = [], router == "hidden_avg"
        with Progress("prompts", len(rows), "experts", first="compiling") as progress:
            for each in rows:
                result.append(directions(config, params, each, average=average))
                progress.update(len(result))
                signals.check()
    return np.stack(result)


def _about(prompts: Sequence[Prompts], rows_ExLxD: np.ndarray) -> list[Json]:
    """Returns what is recorded of prompts: how near an expert's rows are to the nearest other's.

    That is the mean over layers of the cosine: near 1 the router cannot tell the two apart.
    """
    cosines_ExE = np.mean(np.einsum("eld,fld->lef", rows_ExLxD, rows_ExLxD), axis=0)
    np.fill_diagonal(cosines_ExE, -1.0)
    return [
        {
            "source": each.source,
            "count": sum(bool(text.strip()) for text in each.texts),
            "digest": checksum([*each.texts]),
            "nearest": round(float(nearest), 4),
        }
        for each, nearest in zip(prompts, cosines_ExE.max(axis=1), strict=True)
    ]


def _parts(
    opened: Sequence[Checkpoint], rows_ExLxD: np.ndarray, shared: str, name: str
) -> Iterator[np.ndarray]:
    """Yields the parts of a parameter of the mixture along its first axis, one at a time."""
    base, *experts = opened
    layer, _, part = name.rpartition("/")
    if part == "router":
        number = int(layer.split("layers_")[1].partition("/")[0])
        yield np.ascontiguousarray(rows_ExLxD[:, number].T)
    elif part.startswith(_EXPERT):
        for expert in experts:
            yield _read(expert, f"{layer}/{part.removeprefix(_EXPERT)}")
    elif shared == "base":
        yield _read(base, name)
    else:
        total = _read(experts[0], name).astype(np.float32, copy=False)
        for expert in experts[1:]:
            total += _read(expert, name).astype(np.float32, copy=False)
        yield total / np.float32(len(experts))


def _write(
    out: AnyPath,
    config: LlamaConfig,
    dtype: np.dtype,
    parts: Callable[[str], Iterator[np.ndarray]],
    fields: JsonObject,
) -> Manifest:
    """Writes an m2l checkpoint, the largest parameters first."""
    described = {name: (shape, dtype) for name, shape in parameter_shapes(config).items()}
    names = sorted(described, key=lambda name: -math.prod(described[name][0]))
    done = 0
    with (
        writing(out, described) as writer,
        Progress(f"mixing {config.num_experts} experts", len(names), "tensors") as progress,
    ):

        def write(name: str) -> None:
            for part in parts(name):
                for block in blocks(part, dtype, name):
                    writer.append(name, block)

        def advance(_: None) -> None:
            nonlocal done
            done += 1
            progress.update(done)
            signals.check()

        in_parallel(write, names, advance)
        return writer.finish(**fields)


def _read(source: Checkpoint, name: str) -> np.ndarray:
    """Reads a parameter whole, checked: its digest if there is one, and that it is finite."""
    stored = source.parameters[name]
    if inputs.digested(stored) is not stored:
        inputs.read_and_check(source, name, stored.size)
    if isinstance(stored, StoredTensor):
        array = stored.read_checked()
    else:
        array = read_whole(stored)
        if isinstance(stored, StoredArray):
            stored.check(stored.digest_of(array))
    if not np.isfinite(array).all():
        inputs.refuse_nonfinite([source], Span(name, 0, array.size))
    return array
